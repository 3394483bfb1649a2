"""Other Python threads run while the native core works."""
