"""Figures of routers from their predictions: discrimination, calibration, accuracy-cost curves, intervals."""
