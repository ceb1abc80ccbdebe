"""Compares models on one converted data set: plans, runs, and the report with its significance."""
