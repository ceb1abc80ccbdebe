"""Converts a raw log to records, vocabularies and fitted transforms."""
