"""Files that start a training on a cluster, made for its command line by `stem-submit` (`stem_tf.jobs.submit`)."""
