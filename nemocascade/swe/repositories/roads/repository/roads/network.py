"""The towns and roads themselves."""


class Network:
    """Roads go both ways; each has a length."""

    def __init__(self):
        self.towns = {}

    def add_town(self, name):
        """A town, at first without a road."""
        self.towns.setdefault(name, {})

    def link(self, one, other, length):
        """A road; of two between the same towns the shorter counts.

        Raises ValueError for a length that is not above 0.
        """
        if length <= 0:
            raise ValueError("a road must have a length")
        self.add_town(one)
        self.add_town(other)
        best = min(length, self.towns[one].get(other, length))
        self.towns[one][other] = best
        self.towns[other][one] = best

    def near(self, name):
        """The towns that a road leads to, by name."""
        return sorted(self.towns[name])

    def close(self, one, other):
        """No road any more between two towns."""
        self.towns[one].pop(other, None)
        self.towns[other].pop(one, None)
