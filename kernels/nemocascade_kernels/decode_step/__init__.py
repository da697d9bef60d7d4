"""Decode operators of a model's layers: one token for each of many sequences."""
