"""Drift: whether live traffic is still like the training queries, and whether the confidences still hold."""
