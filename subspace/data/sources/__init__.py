"""People's own data: files, folders, saved data sets and the hub's, from their bytes to rows of one form."""
