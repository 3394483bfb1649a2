"""Ctrl-C, and an exception of a callback, stop what runs, and leave everything usable."""
