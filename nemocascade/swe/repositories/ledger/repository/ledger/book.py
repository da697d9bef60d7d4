"""Many accounts."""

from ledger.account import Account
from ledger.money import show


class Book:
    """Accounts by the name of their owner."""

    def __init__(self):
        self.accounts = {}

    def open(self, owner):
        """The account of an owner, a new one if there is none."""
        if owner not in self.accounts:
            self.accounts[owner] = Account(owner)
        return self.accounts[owner]

    def transfer(self, source, target, amount, note=""):
        """Move cents from one account to another; nothing happens if there are too few."""
        self.open(source).withdraw(amount, note)
        self.open(target).deposit(amount, note)

    def total(self, note):
        """Cents that came in under a note, over all accounts, less those that went out."""
        entries = (e for account in self.accounts.values() for e in account.entries)
        return sum(amount for amount, text in entries if text == note)

    def statement(self):
        """A line for each owner, in the order of their names."""
        lines = (f"{o}: {show(self.accounts[o].balance)}" for o in sorted(self.accounts))
        return "\n".join(lines)
