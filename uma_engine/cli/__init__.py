"""The `uma` command."""
