"""Searches on Ray: `tune.sweep` for the prefill router, `tune.semantic` for the grid of semantic routers."""
