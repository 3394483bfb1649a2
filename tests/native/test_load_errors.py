"""A file that cannot be loaded, or memory that is not there, is an exception that says why; the process goes on."""
