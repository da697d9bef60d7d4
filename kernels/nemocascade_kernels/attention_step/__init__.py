"""One step of grouped-query attention for many sequences."""
