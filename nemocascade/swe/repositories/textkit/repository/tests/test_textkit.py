import unittest

from textkit.names import slug
from textkit.table import table
from textkit.wrap import wrap


class TestTexts(unittest.TestCase):
    def test_short(self):
        self.assertEqual(wrap("a b", 10), ["a b"])

    def test_slug(self):
        self.assertEqual(slug("Red"), "red")

    def test_no_rows(self):
        self.assertEqual(table([]), [])
