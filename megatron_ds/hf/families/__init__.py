"""One file a family, or a group of families that share their table."""
