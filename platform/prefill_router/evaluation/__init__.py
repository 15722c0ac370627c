"""Evaluation of routers on the test split: metrics, accuracy-cost curves, bootstrap intervals, the report."""
