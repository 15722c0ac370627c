"""Semantic routers: they know a query by its text alone, and are baselines (paper 4.2)."""
