"""Data curation: the funnel from many questions to a thousand training examples."""
