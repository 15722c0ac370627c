"""Prefill Router: choose, for every query, the model that will answer it, from an encoder's prefill states."""

__version__ = "0.1.0"
