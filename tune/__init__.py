"""Search over layers, components and trunks on Ray Tune: `python -m tune.sweep`, `python -m tune.summary`."""
