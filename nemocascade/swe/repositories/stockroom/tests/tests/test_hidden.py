import unittest

from stockroom.orders import Order
from stockroom.prices import discount, line_price, postage
from stockroom.stock import Missing, Stock


class TestStock(unittest.TestCase):
    def test_counts(self):
        stock = Stock()
        stock.add("saw")
        stock.add("saw", 4)
        self.assertEqual(stock.count("saw"), 5)

    def test_all_or_nothing(self):
        stock = Stock()
        stock.add("saw", 2)
        with self.assertRaises(Missing):
            stock.take({"saw": 1, "axe": 1})
        self.assertEqual(stock.count("saw"), 2)

    def test_the_last_one(self):
        stock = Stock()
        stock.add("axe", 2)
        stock.take({"axe": 2})
        self.assertEqual(stock.count("axe"), 0)

    def test_low(self):
        stock = Stock()
        stock.add("saw", 3)
        stock.add("axe", 2)
        stock.add("nail", 9)
        self.assertEqual(stock.low(3), ["axe"])
        self.assertEqual(stock.low(4), ["axe", "saw"])


class TestPrices(unittest.TestCase):
    def test_discount(self):
        self.assertEqual([discount(n) for n in (1, 11, 60)], [0, 5, 10])

    def test_discount_at_the_limits(self):
        self.assertEqual(discount(10), 5)
        self.assertEqual(discount(50), 10)

    def test_halves_go_up(self):
        self.assertEqual(line_price(1, 10), 10)
        self.assertEqual(line_price(3, 10), 29)

    def test_postage(self):
        self.assertEqual(postage(4999), 490)
        self.assertEqual(postage(5000), 0)


class TestOrders(unittest.TestCase):
    def test_cost(self):
        order = Order({"saw": 1000, "nail": 7})
        order.put("saw", 2)
        order.put("nail")
        self.assertEqual(order.cost(), 2497)

    def test_put_twice(self):
        order = Order({"saw": 1000})
        order.put("saw")
        order.put("saw", 5)
        self.assertEqual(order.cost(), 6000)

    def test_drop(self):
        order = Order({"saw": 1000})
        order.put("saw")
        order.drop("saw")
        order.drop("axe")
        self.assertEqual(order.cost(), 0)

    def test_fill(self):
        stock, order = Stock(), Order({"saw": 1000})
        stock.add("saw", 3)
        order.put("saw", 2)
        order.fill(stock)
        self.assertEqual(stock.count("saw"), 1)
        self.assertEqual(order.cost(), 0)
