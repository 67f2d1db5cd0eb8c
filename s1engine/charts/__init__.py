"""Charts and tables as data, and their one SVG, PNG, HTML and text writer."""
