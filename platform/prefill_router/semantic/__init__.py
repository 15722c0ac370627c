"""Semantic routers: baselines that read nothing but the text (paper 4.2)."""
