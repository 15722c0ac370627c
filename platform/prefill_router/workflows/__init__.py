"""Training and evaluation from files to files. Jobs, sweeps and the Python API call these functions."""
