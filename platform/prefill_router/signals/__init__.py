"""Signals: which layer predicts the correctness of a target, and the projection of its states."""
