"""The verbs of the command, a file each: what one takes, its examples, and what it does."""
