"""The gate: scores held-back rows with a candidate and with what is served, and publishes only what the rules allow."""
