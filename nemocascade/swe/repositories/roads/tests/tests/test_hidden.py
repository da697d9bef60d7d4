import unittest

from roads.network import Network
from roads.regions import bridges, regions
from roads.ways import distances, shortest


def square():
    network = Network()
    network.link("a", "b", 1)
    network.link("b", "c", 1)
    network.link("c", "d", 1)
    network.link("a", "d", 5)
    return network


class TestNetwork(unittest.TestCase):
    def test_the_shorter_counts(self):
        network = Network()
        network.link("a", "b", 4)
        network.link("b", "a", 2)
        network.link("a", "b", 9)
        self.assertEqual(network.towns, {"a": {"b": 2}, "b": {"a": 2}})

    def test_no_length(self):
        with self.assertRaises(ValueError):
            Network().link("a", "b", 0)

    def test_a_town_keeps_its_roads(self):
        network = square()
        network.add_town("a")
        self.assertEqual(network.near("a"), ["b", "d"])

    def test_a_closed_road(self):
        network = square()
        network.close("b", "a")
        self.assertEqual(network.near("a"), ["d"])
        self.assertEqual(network.near("b"), ["c"])


class TestWays(unittest.TestCase):
    def test_distances(self):
        self.assertEqual(distances(square(), "a"), {"a": 0, "b": 1, "c": 2, "d": 3})

    def test_around(self):
        self.assertEqual(shortest(square(), "a", "d"), ["a", "b", "c", "d"])

    def test_none(self):
        network = square()
        network.add_town("e")
        self.assertEqual(shortest(network, "a", "e"), None)

    def test_to_itself(self):
        self.assertEqual(shortest(square(), "b", "b"), ["b"])


class TestRegions(unittest.TestCase):
    def test_two(self):
        network = square()
        network.link("x", "y", 1)
        network.add_town("e")
        self.assertEqual(regions(network), [["a", "b", "c", "d"], ["x", "y"], ["e"]])

    def test_no_bridge_in_a_ring(self):
        self.assertEqual(bridges(square()), [])

    def test_a_bridge(self):
        network = square()
        network.link("d", "e", 7)
        self.assertEqual(bridges(network), [("d", "e")])
        self.assertEqual(distances(network, "e")["d"], 7)
