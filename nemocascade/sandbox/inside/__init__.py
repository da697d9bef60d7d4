"""Code that runs isolated: standard library only, started by path, not installed."""
