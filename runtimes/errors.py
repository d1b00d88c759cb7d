"""Every way a request can fail, with its status on both protocols.

Rule of the file: a failure names who is at fault and whether to try again. Retryable is only UNAVAILABLE or
RESOURCE_EXHAUSTED. Messages are for clients: no paths, addresses or tracebacks.
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """gRPC status codes (grpc.io/docs/guides/status-codes)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


#: The HTTP status that stands for a gRPC code on the REST surface.
HTTP_STATUS: dict[Code, int] = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}


class Reason:
    """Machine-readable causes, carried in control answers and in the ``x-raymesh-reason`` header."""

    BAD_INPUT = "BAD_INPUT"
    NOT_REGISTERED = "NOT_REGISTERED"
    NOT_LOADED = "NOT_LOADED"
    LOAD_FAILED = "LOAD_FAILED"
    LOAD_TIMEOUT = "LOAD_TIMEOUT"
    NO_CAPACITY = "NO_CAPACITY"
    NO_INSTANCE = "NO_INSTANCE"
    NOT_LEADER = "NOT_LEADER"
    DRAINING = "DRAINING"
    FENCED = "FENCED"
    REGISTRY_UNAVAILABLE = "REGISTRY_UNAVAILABLE"
    MODEL_RAISED = "MODEL_RAISED"
    DEADLINE = "DEADLINE"
    DENIED = "DENIED"
    UNSUPPORTED = "UNSUPPORTED"


class RequestError(Exception):
    """A request that ends in an error the client should see.

    `code` decides the status on both protocols, `reason` is for machines, `retry_after_s` a hint (0: none).
    """

    def __init__(self, code: Code, message: str, *, reason: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = reason
        self.retry_after_s = retry_after_s

    @property
    def http_status(self) -> int:
        """The HTTP status for this error (500 for codes without a better one)."""
        return HTTP_STATUS.get(self.code, 500)


class InvalidInput(RequestError):
    """The client sent something malformed; the message names the part and the fix."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.INVALID_ARGUMENT, message, reason=Reason.BAD_INPUT)


class TooLarge(RequestError):
    """A message above the limit. The message of the error says how to raise it."""

    def __init__(self, bytes_max: int, what: str = "the message") -> None:
        super().__init__(
            Code.RESOURCE_EXHAUSTED,
            f"{what} is larger than {bytes_max} bytes; raise message_bytes_max to accept it",
            reason=Reason.BAD_INPUT,
        )

    @property
    def http_status(self) -> int:
        """413: trying again does not help."""
        return 413


class UnknownEncoding(RequestError):
    """A body in an encoding we cannot undo."""

    def __init__(self, encoding: str) -> None:
        super().__init__(
            Code.UNIMPLEMENTED, f"unknown encoding {encoding!r}: use gzip, deflate or none", reason=Reason.UNSUPPORTED
        )

    @property
    def http_status(self) -> int:
        """415, which HTTP has for just this."""
        return 415


class ModelNotFound(RequestError):
    """No such model. The wording is Triton's; published example clients check for it."""

    def __init__(self, model: str) -> None:
        super().__init__(
            Code.NOT_FOUND, f"Request for unknown model: '{model}' is not found", reason=Reason.NOT_REGISTERED
        )


class LoadFailed(RequestError):
    """The model's file cannot be made into a model; trying again does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.FAILED_PRECONDITION, message, reason=Reason.LOAD_FAILED)


class Unavailable(RequestError):
    """Not now; the same request may succeed later."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(Code.UNAVAILABLE, message, reason=reason, retry_after_s=retry_after_s)


class CapacityExhausted(RequestError):
    """No room for the model now; the same request may succeed later."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(Code.RESOURCE_EXHAUSTED, message, reason=Reason.NO_CAPACITY, retry_after_s=retry_after_s)
