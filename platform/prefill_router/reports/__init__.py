"""HTML pages, SVG figures and text tables. No other package of the library imports this one."""
