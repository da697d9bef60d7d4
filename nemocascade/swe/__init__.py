"""Software repair: repositories, retrieval, edits and tests.

This file stays empty.
"""
