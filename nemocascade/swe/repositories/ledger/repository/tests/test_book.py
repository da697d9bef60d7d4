import unittest

from ledger.book import Book
from ledger.money import parse, show


class TestBook(unittest.TestCase):
    def test_open_twice(self):
        book = Book()
        self.assertIs(book.open("ana"), book.open("ana"))

    def test_amounts(self):
        self.assertEqual(parse("12"), 1200)
        self.assertEqual(show(1200), "12.00")
