"""Signals: which layer tells whether a target will be right, and its states reduced to a few components."""
