"""Sandbox for untrusted programs.

`pool.py` is the trusted side: it sends programs to workers and receives outcomes. `launch.py`
starts a worker in an isolation backend. The code in `inside/` runs isolated and imports only the
standard library. Expected outputs never enter the sandbox: the caller compares them.
"""
