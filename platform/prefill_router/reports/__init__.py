"""HTML pages, SVG plots and text tables. Metrics, experiments and everything below them do not import this package."""
