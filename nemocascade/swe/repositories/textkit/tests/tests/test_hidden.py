import unittest

from textkit.names import camel, slug, unique
from textkit.table import table
from textkit.wrap import indent, wrap


class TestWrap(unittest.TestCase):
    def test_breaks(self):
        self.assertEqual(wrap("one two three", 7), ["one two", "three"])

    def test_exact(self):
        self.assertEqual(wrap("ab cd", 5), ["ab cd"])

    def test_long_word(self):
        self.assertEqual(wrap("a abcdefgh b", 3), ["a", "abcdefgh", "b"])

    def test_last_line(self):
        self.assertEqual(wrap("x y", 1), ["x", "y"])

    def test_indent(self):
        self.assertEqual(indent(["a", "", "b"], 2), ["  a", "", "  b"])


class TestTable(unittest.TestCase):
    def test_columns(self):
        rows = [["a", "b"], ["ccc", "d"]]
        self.assertEqual(table(rows), ["a    b", "ccc  d"])

    def test_no_space_at_the_end(self):
        rows = [["a", "b"], ["c", "long"]]
        self.assertEqual(table(rows, 1), ["a b", "c long"])


class TestNames(unittest.TestCase):
    def test_slug(self):
        self.assertEqual(slug("Red, Blue!"), "red-blue")
        self.assertEqual(slug("--x--"), "x")

    def test_camel(self):
        self.assertEqual(camel("red blue sky"), "redBlueSky")

    def test_unique(self):
        self.assertEqual(unique(["a", "b", "a", "a"]), ["a", "b", "a-2", "a-3"])
