"""The options of the core and their Python counterparts have the same fields and defaults."""
