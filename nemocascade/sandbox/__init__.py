"""Runs programs that nobody has read.

`pool.py` is the trusted side: it sends programs to workers and gets outcomes. `launch.py` starts a
worker behind its walls. What is in `inside/` runs behind them, and imports the standard library
only. Expected outputs never enter the sandbox: whoever asked compares.
"""
