import unittest

from roads.network import Network
from roads.ways import shortest


class TestRoads(unittest.TestCase):
    def test_one_road(self):
        network = Network()
        network.link("ayr", "bly", 3)
        self.assertEqual(network.near("ayr"), ["bly"])
        self.assertEqual(shortest(network, "ayr", "bly"), ["ayr", "bly"])
