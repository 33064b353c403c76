"""One file a method. Importing a file registers it; nothing is listed here."""
