"""The Mamba-2 mixer between its projections, over packed documents."""
