"""Capacity planning: what a model, a machine and a workload come to, before any of them exists."""
