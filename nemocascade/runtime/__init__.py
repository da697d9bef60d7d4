"""Services shared by a running job: logging, the world of ranks, the watchdog, errors, HTTP."""
