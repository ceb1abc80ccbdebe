"""Raw logs: finds files, reads CSV and Parquet, casts columns."""
