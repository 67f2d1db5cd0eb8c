"""Drivers of other engines for ``bench cpu`` (the adapters of ``cpu_adapter.py``).

A driver runs in its engine's environment, where s1engine is not installed: it imports that engine
and the standard library only.
"""
