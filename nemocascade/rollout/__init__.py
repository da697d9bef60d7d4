"""Generation on the live training weights, and episodes made of it."""
