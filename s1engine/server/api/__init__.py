"""HTTP bodies and responses of each API: what a request may hold, how an answer looks."""
