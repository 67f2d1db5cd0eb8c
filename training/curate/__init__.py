"""Data curation: the funnel from many questions to 1,000 rows of training data."""
