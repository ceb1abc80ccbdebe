"""Load tests of a server that answers TensorFlow Serving's Predict: the job `stem-load` (`export.jobs.load`)."""
