"""The commands: one script per verb, a page each, that reads a configuration and calls one function."""
