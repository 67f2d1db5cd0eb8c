"""Other engines beside ours, each behind the same few lines of JSON.

An adapter runs in its engine's own environment, where nothing of s1engine is installed: it imports
that engine, the standard library and ``protocol``, nothing else.
"""
