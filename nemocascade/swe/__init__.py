"""What software repair is made from: repositories, retrieval, edits and tests.

This file stays empty.
"""
