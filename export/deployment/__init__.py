"""Files that a team needs to run an export, made for one version by the job `stem-deploy` (`export.jobs.deploy`)."""
