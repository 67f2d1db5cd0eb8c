"""Drivers of other engines for ``bench cpu`` and ``bench embed``, see ``cpu_adapter`` and
``embed_host``.

A driver runs in its engine's environment, where s1engine is not installed: it imports that engine
and the standard library only.
"""
