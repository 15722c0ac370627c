"""Search over layers, components and trunks on Ray Tune. Empty until the search is built on the jobs below it."""
