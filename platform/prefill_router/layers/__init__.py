"""Results of the layer search: tables, peaks, comparison of encoders and targets."""
