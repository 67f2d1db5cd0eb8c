"""The exceptions that cross layers: user errors, each naming its field, and engine failures.

Server and command line choose the HTTP status and the exit status, not this file.
"""


class RequestError(ValueError):
    """A request or an option that is wrong.

    Attributes:
        param: name of the wrong field, as the user spelled it; None if no single field is wrong.
        code: short machine-readable reason, for example ``context_length_exceeded``.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelError(ValueError):
    """A model directory that cannot be loaded: missing, truncated or unsupported.

    The message is one line of printable text: characters of a file that are neither are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class EngineDeadError(RuntimeError):
    """A step of the engine failed, so this engine can serve no further request."""


class ShuttingDownError(EngineDeadError):
    """The server ends before the request has."""


class RequestFailedError(RuntimeError):
    """The engine failed with this one request; other requests are not affected."""


class TryAgainError(RuntimeError):
    """The engine cannot decide about this request now; the same request may succeed later."""
