"""Routing: from features to confidences, costs and a choice."""
