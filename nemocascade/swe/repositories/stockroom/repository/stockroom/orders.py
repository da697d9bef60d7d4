"""Orders that take from the stock."""

from stockroom.prices import line_price, postage


class Order:
    """Items and their counts, at the prices of a list."""

    def __init__(self, prices):
        self.prices = prices
        self.lines = {}

    def put(self, item, count=1):
        """Ask for items. Raises KeyError for one without a price."""
        if item not in self.prices:
            raise KeyError(item)
        self.lines[item] = self.lines.get(item, 0) + count

    def drop(self, item):
        """Ask for none of these any more."""
        self.lines.pop(item, None)

    def cost(self):
        """Cents for all lines and the postage; an empty order costs nothing."""
        if not self.lines:
            return 0
        goods = sum(line_price(self.prices[item], n) for item, n in self.lines.items())
        return goods + postage(goods)

    def fill(self, stock):
        """Take the items out of the stock; the order is empty then."""
        stock.take(self.lines)
        self.lines = {}
