"""Towns and roads."""
