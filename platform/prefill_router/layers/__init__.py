"""Results of the layer search: tables, peaks, encoder-target comparison."""
