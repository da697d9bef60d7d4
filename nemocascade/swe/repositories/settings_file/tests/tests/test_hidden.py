import unittest

from settings_file.layers import expand, overlay
from settings_file.lines import Broken, read_value, strip_comment
from settings_file.parser import parse


class TestLines(unittest.TestCase):
    def test_comment(self):
        self.assertEqual(strip_comment("a = 1  # one"), "a = 1")

    def test_no_comment_in_quotes(self):
        self.assertEqual(strip_comment('a = "x # y"  # z'), 'a = "x # y"')

    def test_values(self):
        self.assertEqual([read_value(t) for t in ("7", "-2", "x y")], [7, -2, "x y"])

    def test_truth(self):
        self.assertEqual([read_value(t) for t in ("true", "false")], [True, False])

    def test_quotes(self):
        self.assertEqual(read_value('"7"'), "7")
        self.assertEqual(read_value('""'), "")
        self.assertEqual(read_value('"'), '"')


class TestParser(unittest.TestCase):
    def test_sections(self):
        text = "a = 1\n\n[net]\nhost = here\n[disk]\nsize = 9\n"
        wanted = {"": {"a": 1}, "net": {"host": "here"}, "disk": {"size": 9}}
        self.assertEqual(parse(text), wanted)

    def test_a_section_twice(self):
        text = "[net]\na = 1\n[disk]\n[net]\nb = 2\n"
        self.assertEqual(parse(text), {"": {}, "net": {"a": 1, "b": 2}, "disk": {}})

    def test_a_sign_in_the_value(self):
        self.assertEqual(parse("sum = 1 + 1 = 2"), {"": {"sum": "1 + 1 = 2"}})

    def test_the_number_of_a_broken_line(self):
        with self.assertRaises(Broken) as caught:
            parse("a = 1\noops\n")
        self.assertEqual(str(caught.exception), "line 2: 'oops'")


class TestLayers(unittest.TestCase):
    def test_over(self):
        found = overlay({"net": {"a": 1, "b": 2}}, {"net": {"b": 3}, "disk": {"c": 4}})
        self.assertEqual(found, {"net": {"a": 1, "b": 3}, "disk": {"c": 4}})

    def test_the_base_stays(self):
        base = {"net": {"a": 1}}
        overlay(base, {"net": {"a": 2}})
        self.assertEqual(base, {"net": {"a": 1}})

    def test_expand(self):
        given = {"": {"home": "/h"}, "net": {"log": "{.home}/log", "all": "{net.log}/all"}}
        self.assertEqual(expand(given)["net"], {"log": "/h/log", "all": "/h/log/all"})

    def test_circle(self):
        with self.assertRaises(ValueError):
            expand({"a": {"x": "{a.y}", "y": "{a.x}"}})
