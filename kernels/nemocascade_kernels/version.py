"""The version of both packages. It stands here alone: setup.py and `nemocascade` read this file."""

__version__ = "0.1.0"
