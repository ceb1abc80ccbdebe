"""Console scripts: stem-export, stem-predict, stem-serve, stem-deploy, stem-load."""
