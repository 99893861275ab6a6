"""The command line: one file a command, each parses, calls, shows. `main` holds them together."""
