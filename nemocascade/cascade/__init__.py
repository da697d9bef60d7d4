"""Ordered stages: what each starts from, what is done already, scores, alarms, teachers."""
