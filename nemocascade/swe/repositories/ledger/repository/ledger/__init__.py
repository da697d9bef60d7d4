"""Accounts and the book that holds them."""
