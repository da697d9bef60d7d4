"""The version of both packages. Its only definition: setup.py and `nemocascade` read this file."""

__version__ = "0.1.0"
