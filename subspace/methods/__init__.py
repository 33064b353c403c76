"""One module for each method, discovered automatically; ``README.md`` in this folder lists them."""
