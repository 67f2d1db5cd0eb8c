"""Making models that think. Imported as s1engine.training; s1engine itself never imports it."""
