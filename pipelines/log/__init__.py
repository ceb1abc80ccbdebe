"""Raw logs: finding files, reading CSV and Parquet, casting columns."""
