"""Settings in a text file."""
