"""Complete recipes that run on two cores: the bundled s1-nano, and the s1 paper in miniature."""
