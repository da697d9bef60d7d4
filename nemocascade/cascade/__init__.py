"""Cascades: ordered stages, scores and alarms, the choice of teachers, the report."""
