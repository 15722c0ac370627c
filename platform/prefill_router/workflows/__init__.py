"""Whole steps of the method: inputs from files, training, evaluation. Jobs, sweeps and the Python API call these."""
