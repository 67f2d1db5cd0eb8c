"""Several replicas of the server behind one address, placed by Ray Serve."""
