"""One-off measurements, for a checkout only: a wheel does not hold them. README.md lists them."""
