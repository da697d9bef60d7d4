"""The routed experts: grouped GEMMs over the rows of each expert, dispatch and combine."""
