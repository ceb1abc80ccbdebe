"""What all packages of this project use: the frame of a job, errors, files, progress, worker processes."""
