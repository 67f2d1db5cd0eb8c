"""Measuring accuracy against thinking: tasks, grading, runs. Uses the engine's public face only."""
