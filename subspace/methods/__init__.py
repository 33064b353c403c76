"""One file for each method, found by itself; ``README.md`` beside it has the table of them."""
