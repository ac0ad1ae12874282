"""The command line: `main` parses and calls, `text` says it to people."""
