"""Files with which a team runs an export: made by the job `stem-deploy` (`export.deploy`) to fit one version."""
