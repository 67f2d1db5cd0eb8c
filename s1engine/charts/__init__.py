"""Figures as data, and the one writer of SVG, PNG, HTML pages and text tables. Knows no run."""
