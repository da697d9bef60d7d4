"""What the layers of a model do with one token of each of many sequences."""
