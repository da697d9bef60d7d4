"""The routed experts: grouped GEMMs over the rows of each expert, and what stands around them."""
