import unittest

from settings_file.layers import overlay
from settings_file.parser import parse


class TestSettings(unittest.TestCase):
    def test_one_key(self):
        self.assertEqual(parse("name = ana"), {"": {"name": "ana"}})

    def test_nothing_over_nothing(self):
        self.assertEqual(overlay({}, {}), {})
