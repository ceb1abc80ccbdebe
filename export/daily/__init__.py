"""The days of `stem-daily`: a log is converted, learned by the model of the day before, compared and published."""
