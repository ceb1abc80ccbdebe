"""The gate: scores held-back rows with a candidate and with what is served, and publishes only what the rules allow."""

REFUSED_CODE = 3
"""The exit code of jobs that publish nothing because a rule does not hold."""
