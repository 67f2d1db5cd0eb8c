"""The errors a user can cause, each naming the field at fault.

Owns the one exception type that crosses every layer. HTTP status codes and exit statuses are
decided at the edges (server, cli), not here.
"""


class RequestError(ValueError):
    """A request or an option that cannot be honoured.

    Attributes:
        param: name of the offending field, as the user spelled it; None if no single field is.
        code: short machine-readable reason, for example ``context_length_exceeded``.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelError(ValueError):
    """A model directory that cannot be loaded: missing, truncated or unsupported."""


class EngineDeadError(RuntimeError):
    """The engine's step failed, so no further request can be served by this engine."""


class RequestFailedError(RuntimeError):
    """The engine could not go on with this one request; no other is concerned."""
