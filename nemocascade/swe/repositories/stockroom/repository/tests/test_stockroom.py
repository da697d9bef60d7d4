import unittest

from stockroom.orders import Order
from stockroom.stock import Stock


class TestStockroom(unittest.TestCase):
    def test_empty(self):
        self.assertEqual(Stock().count("saw"), 0)
        self.assertEqual(Order({}).cost(), 0)

    def test_unknown_item(self):
        with self.assertRaises(KeyError):
            Order({}).put("saw")
