"""Drafts a schema from a raw log."""
