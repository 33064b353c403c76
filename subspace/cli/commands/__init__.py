"""One module for each command of ``subspace``: its options, its help text and the function that runs it."""
