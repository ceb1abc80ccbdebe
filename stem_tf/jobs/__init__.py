"""Console scripts: stem-train, stem-evaluate, stem-inspect."""
