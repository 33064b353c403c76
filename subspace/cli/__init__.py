"""The command line: option parsing, help texts and error reporting around one module for each command."""
