"""Measurements of the engine. Imported as s1engine.bench; run by ``s1engine bench``."""
