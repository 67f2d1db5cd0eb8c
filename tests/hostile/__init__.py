"""Attacks on a server: each with a canary, a limit of its delay, and a limit of memory."""
