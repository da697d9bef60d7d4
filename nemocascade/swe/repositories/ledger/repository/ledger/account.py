"""One account."""


class Overdrawn(Exception):
    """There is less on the account than was asked for."""


class Account:
    """A balance in cents that never falls below 0, and how it came about."""

    def __init__(self, owner):
        self.owner = owner
        self.entries = []

    @property
    def balance(self):
        """Cents on the account."""
        return sum(amount for amount, _ in self.entries)

    def deposit(self, amount, note=""):
        """Put cents on the account. Raises ValueError unless `amount` is positive."""
        if amount <= 0:
            raise ValueError("an amount must be positive")
        self.entries.append((amount, note))

    def withdraw(self, amount, note=""):
        """Take cents off the account. Raises Overdrawn if there are too few."""
        if amount <= 0:
            raise ValueError("an amount must be positive")
        if amount > self.balance:
            raise Overdrawn(f"{self.owner} has {self.balance}, not {amount}")
        self.entries.append((-amount, note))
