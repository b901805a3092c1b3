"""Evaluations: one file each; each metric is a pure function."""
