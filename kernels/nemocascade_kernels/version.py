"""The version of both packages, defined only here: setup.py and `nemocascade` read this file."""

__version__ = "0.1.0"
