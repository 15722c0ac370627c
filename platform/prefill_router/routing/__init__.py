"""Routing: fit a router, and turn features into confidences, costs and a choice."""
