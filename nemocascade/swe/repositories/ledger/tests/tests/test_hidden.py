import unittest

from ledger.account import Account, Overdrawn
from ledger.book import Book
from ledger.money import parse, show


class TestMoney(unittest.TestCase):
    def test_parse(self):
        self.assertEqual(parse("12.50"), 1250)
        self.assertEqual(parse("7"), 700)

    def test_parse_one_digit(self):
        self.assertEqual(parse("0.5"), 50)
        self.assertEqual(parse("3.1"), 310)

    def test_parse_negative(self):
        self.assertEqual(parse("-1.50"), -150)

    def test_show(self):
        self.assertEqual(show(1205), "12.05")
        self.assertEqual(show(40), "0.40")

    def test_show_negative(self):
        self.assertEqual(show(-150), "-1.50")
        self.assertEqual(show(-5), "-0.05")


class TestAccount(unittest.TestCase):
    def test_all_of_it(self):
        account = Account("ben")
        account.deposit(300)
        account.withdraw(300)
        self.assertEqual(account.balance, 0)

    def test_too_much(self):
        account = Account("ben")
        account.deposit(300)
        with self.assertRaises(Overdrawn):
            account.withdraw(301)
        self.assertEqual(account.balance, 300)


class TestBook(unittest.TestCase):
    def test_move(self):
        book = Book()
        book.open("ana").deposit(500)
        book.transfer("ana", "ben", 200, "rent")
        self.assertEqual(book.statement(), "ana: 3.00\nben: 2.00")

    def test_move_too_much(self):
        book = Book()
        book.open("ana").deposit(100)
        with self.assertRaises(Overdrawn):
            book.transfer("ana", "ben", 200)
        self.assertEqual(book.open("ben").balance, 0)

    def test_total(self):
        book = Book()
        book.open("ana").deposit(500, "pay")
        book.open("ben").deposit(70, "pay")
        book.open("ben").withdraw(20, "food")
        self.assertEqual(book.total("pay"), 570)
        self.assertEqual(book.total("food"), -20)

    def test_order(self):
        book = Book()
        book.open("zoe").deposit(1)
        book.open("ana").deposit(2)
        self.assertEqual(book.statement(), "ana: 0.02\nzoe: 0.01")
