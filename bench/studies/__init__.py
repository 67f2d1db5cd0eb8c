"""One-off studies, for a checkout only; README.md lists them."""
