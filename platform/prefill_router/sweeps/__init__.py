"""Sweeps without Ray: shared preparation, objectives, trials on disk."""
