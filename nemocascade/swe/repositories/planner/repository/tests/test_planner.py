import unittest

from planner.agenda import plan
from planner.spans import merge


class TestPlanner(unittest.TestCase):
    def test_one_task(self):
        self.assertEqual(plan({"a": 5}, {"a": []}, [], (0, 60)), {"a": (0, 5)})

    def test_nothing_to_merge(self):
        self.assertEqual(merge([(5, 6), (1, 2)]), [(1, 2), (5, 6)])
