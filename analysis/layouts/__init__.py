"""Whole figures from the panels of `analysis.figures`: each takes `Frames` and an experiment's settings."""
