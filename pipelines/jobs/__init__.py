"""Console scripts: stem-describe, stem-convert."""
