"""From a request to its tokens: compiling requests, stepping, and the three ways to embed it."""
