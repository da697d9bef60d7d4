"""Stock, prices and orders."""
