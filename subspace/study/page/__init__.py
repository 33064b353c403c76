"""The page of a study: what it found, as charts and tables in one HTML file."""
