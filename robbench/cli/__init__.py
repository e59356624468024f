"""The command line: one module per command, its options and its use case together."""
