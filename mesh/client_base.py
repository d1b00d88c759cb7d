"""What `Client` and `AsyncClient` share: arguments, deadlines, when to try again, errors.

Rule of the file: whatever does not wait. The two clients differ in nothing but how they do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any

from raymesh.mesh import client_calls as calls
from raymesh.mesh.client_bulk import BulkRegistration, Progress
from raymesh.mesh.client_calls import MeshError, ModelSpec, RpcCall
from raymesh.runtimes.errors import Code

Models = list[dict[str, Any]]

CHANNEL_OPTIONS = (
    # The mesh bounds messages; a second, smaller bound in the client would only confuse.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Back soon after a restart of the mesh; the default waits up to 120 s.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A mesh is inside the network that a proxy leads out of.
    ("grpc.enable_http_proxy", 0),
    ("grpc.primary_user_agent", "raymesh"),
)

#: Models in one call of `register_many`. Larger batches are not faster, and hold up whoever else asks the mesh.
BATCH_MODELS = 250

#: Pause before the first retry, doubled for each further one, when the mesh gives no hint.
_RETRY_PAUSE_S = 0.05


class ClientBase:
    """A target, a protocol, a deadline for every call, and how often to try again."""

    def __init__(
        self,
        target: str = "127.0.0.1:8033",
        *,
        protocol: str = "grpc",
        timeout_s: float = 60.0,
        retries: int = 1,
    ) -> None:
        host, separator, port = target.rpartition(":")
        if not separator or not host or not port.isdigit():
            raise ValueError(f"target {target!r}: use host:port, such as 127.0.0.1:8033")
        if protocol not in ("grpc", "rest"):
            raise ValueError(f"protocol {protocol!r}: use 'grpc' or 'rest'")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s {timeout_s}: must be more than 0")
        self.target = target
        self.protocol = protocol
        self.timeout_s = timeout_s
        self.retries = retries
        self._host, self._port = host.strip("[]"), int(port)
        self._rpcs: dict[str, Any] = {}

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)

    def _pause_s(self, error: MeshError, attempt: int, deadline: float, retries: int) -> float:
        """How long to wait before trying again. Raises `error` when there is no point in it.

        Trying again is safe: registering, loading and unregistering twice is like once, and predicting changes nothing.
        """
        hint_s = error.retry_after_s or _RETRY_PAUSE_S * 2**attempt
        # Jitter, so that callers refused together do not come back together.
        pause_s = hint_s * random.uniform(1.0, 1.5)
        if error.code is not Code.UNAVAILABLE or attempt >= retries or time.monotonic() + pause_s >= deadline:
            raise error
        return pause_s

    def _registration(
        self, specs: Iterable[ModelSpec], batch: int, concurrency: int, progress: Progress | None
    ) -> BulkRegistration:
        # A model's time went with its call, so there is no deadline to keep.
        return BulkRegistration(
            specs,
            batch=batch,
            concurrency=concurrency,
            progress=progress,
            pause_s=lambda error, attempt: self._pause_s(error, attempt, float("inf"), self.retries),
        )

    def _rpc(self, channel: Any, call: RpcCall[Any]) -> Any:
        rpc = self._rpcs.get(call.path)
        if rpc is None:
            rpc = self._rpcs[call.path] = channel.unary_unary(
                call.path,
                request_serializer=type(call.request).SerializeToString,
                response_deserializer=call.answer_class.FromString,
            )
        return rpc

    def _unreachable(self, error: BaseException) -> MeshError:
        return MeshError(Code.UNAVAILABLE, f"cannot reach a mesh at {self.target}: {str(error) or repr(error)}")

    def _rpc_error(self, error: Any) -> MeshError:
        metadata = as_mapping(error.initial_metadata()) | as_mapping(error.trailing_metadata())
        details = error.details() or ""
        if details.startswith("failed to connect"):
            return self._unreachable(ConnectionError(details.rpartition(": ")[2]))
        return calls.rpc_error(error.code().value[0], details, metadata)


def as_mapping(metadata: Any) -> dict[str, str]:
    """gRPC metadata as a mapping; binary values are left out."""
    return {key: value for key, value in metadata or () if isinstance(value, str)}
