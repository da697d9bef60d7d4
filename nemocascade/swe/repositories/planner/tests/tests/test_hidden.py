import unittest

from planner.agenda import plan
from planner.order import Cycle, arrange
from planner.spans import free, merge, overlap


class TestOrder(unittest.TestCase):
    def test_chain(self):
        self.assertEqual(arrange({"a": ["b"], "b": ["c"], "c": []}), ["c", "b", "a"])

    def test_choice(self):
        self.assertEqual(arrange({"z": [], "m": [], "b": ["z"]}), ["m", "z", "b"])

    def test_unnamed(self):
        self.assertEqual(arrange({"a": ["x"]}), ["x", "a"])

    def test_circle(self):
        with self.assertRaises(Cycle):
            arrange({"a": ["b"], "b": ["a"]})


class TestSpans(unittest.TestCase):
    def test_overlap(self):
        self.assertTrue(overlap((0, 10), (5, 7)))
        self.assertFalse(overlap((0, 10), (20, 30)))

    def test_touching_spans_do_not_overlap(self):
        self.assertFalse(overlap((0, 10), (10, 20)))
        self.assertFalse(overlap((10, 20), (0, 10)))

    def test_merge(self):
        self.assertEqual(merge([(8, 9), (0, 3), (2, 5)]), [(0, 5), (8, 9)])

    def test_merge_touching(self):
        self.assertEqual(merge([(0, 3), (3, 5)]), [(0, 5)])

    def test_merge_inside(self):
        self.assertEqual(merge([(0, 9), (2, 4)]), [(0, 9)])

    def test_free(self):
        self.assertEqual(free([(2, 4), (6, 9)], (0, 8)), [(0, 2), (4, 6)])

    def test_free_at_the_end(self):
        self.assertEqual(free([(0, 4)], (0, 8)), [(4, 8)])


class TestPlan(unittest.TestCase):
    def test_around_what_is_busy(self):
        found = plan({"a": 10, "b": 5}, {"a": [], "b": ["a"]}, [(5, 20)], (0, 60))
        self.assertEqual(found, {"a": (20, 30), "b": (30, 35)})

    def test_no_room(self):
        self.assertEqual(plan({"a": 10}, {"a": []}, [(5, 20)], (0, 25)), {})

    def test_just_enough(self):
        self.assertEqual(plan({"a": 5}, {"a": []}, [(5, 20)], (0, 25)), {"a": (0, 5)})
