"""Files with which a team runs an export: made by the job `stem-deploy` (`export.jobs.deploy`) to fit one version."""
