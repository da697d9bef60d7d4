"""How many there are of each item."""


class Missing(Exception):
    """There are fewer in stock than were asked for."""


class Stock:
    """Counts by item; an item that nobody added has count 0."""

    def __init__(self):
        self.counts = {}

    def add(self, item, count=1):
        """Put items in."""
        self.counts[item] = self.counts.get(item, 0) + count

    def count(self, item):
        """How many there are."""
        return self.counts.get(item, 0)

    def take(self, wanted):
        """Take out all of `wanted` (counts by item), or nothing: then raises Missing."""
        short = [item for item, n in wanted.items() if self.count(item) < n]
        if short:
            raise Missing(", ".join(sorted(short)))
        for item, n in wanted.items():
            self.counts[item] -= n

    def low(self, least):
        """The items with fewer than `least`, by name."""
        return sorted(item for item, n in self.counts.items() if n < least)
