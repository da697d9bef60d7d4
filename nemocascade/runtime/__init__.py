"""What a running process needs everywhere: logging, the world of ranks, the watchdog, errors."""
