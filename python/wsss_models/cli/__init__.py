"""The `wsss` command."""
