"""Engines that generate rollouts: the live training weights, or a server."""
