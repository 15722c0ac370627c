"""Semantic routers: baselines that route from a query's text and its sentence embedding (paper 4.2)."""
