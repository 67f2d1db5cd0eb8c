"""Coverage-guided fuzzing of everything that reads bytes of others: ``make fuzz``.

Each target is a function of bytes that raises for a bug alone. Its corpus, the smallest inputs that
reach all the code known so far and those that once showed a bug, runs in ``make test`` as well.
"""
