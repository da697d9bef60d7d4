"""Turns tasks into training sequences: episodes, verification, groups, advantages, teachers."""
