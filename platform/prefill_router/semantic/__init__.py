"""Semantic routers: baselines that know a query by its benchmark or its embedding alone (paper 4.2)."""
