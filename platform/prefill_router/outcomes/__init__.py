"""Outcomes: correctness, length and cost of the answers of target models to queries."""
