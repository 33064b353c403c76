"""Pages of results: one HTML file each, with charts as inline SVG, that needs neither a network nor a script."""
