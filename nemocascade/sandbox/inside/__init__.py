"""The part that runs behind the walls: standard library only, started by path, not installed."""
