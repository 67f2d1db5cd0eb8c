"""What stops a training run while it is under way."""


class TrainingError(RuntimeError):
    """A run that cannot go on: its loss is no number, or a checkpoint cannot be written. All ranks
    raise it together."""
