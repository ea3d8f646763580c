"""Tasks: a table of rows over a few kinds."""
