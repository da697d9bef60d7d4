"""Tasks and time."""
