"""The client of a mesh: `Client` for threads, `AsyncClient` for coroutines, the same methods in both.

Rule of the file: what to ask and how to read it is `client_calls`; here is only the sending, with a deadline on
everything. A `Client` may be shared by threads, an `AsyncClient` by the tasks of one event loop.
"""

from __future__ import annotations

import collections
import http.client
import itertools
import queue
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import grpc

from raymesh.mesh import client_calls as calls
from raymesh.mesh.client_async import AsyncClient
from raymesh.mesh.client_base import BATCH_MODELS, CHANNEL_OPTIONS, ClientBase, Models, as_mapping
from raymesh.mesh.client_bulk import Job, Progress
from raymesh.mesh.client_calls import (
    Call,
    CopyInfo,
    HttpCall,
    MeshError,
    ModelSpec,
    ModelStatus,
    Prediction,
    RegisterSummary,
    RpcCall,
    VModelStatus,
)
from raymesh.runtimes.errors import Code

__all__ = [
    "AsyncClient",
    "Client",
    "CopyInfo",
    "MeshError",
    "ModelSpec",
    "ModelStatus",
    "Prediction",
    "RegisterSummary",
    "VModelStatus",
]

T = TypeVar("T")

#: Idle HTTP connections a client keeps.
_IDLE_CONNECTIONS_MAX = 64


class Client(ClientBase):
    """A mesh, for threads; safe to share between them. Use it as a context manager, or `close()` it.

    `protocol` decides how `predict`, `metadata` and `ready` travel. `timeout_s` bounds every call, retries included;
    `retries` is how often a call the mesh answered UNAVAILABLE is sent again. Every method raises `MeshError`.
    """

    def __init__(
        self, target: str = "127.0.0.1:8033", *, protocol: str = "grpc", timeout_s: float = 60.0, retries: int = 1
    ) -> None:
        super().__init__(target, protocol=protocol, timeout_s=timeout_s, retries=retries)
        # Connects when first used.
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._idle: collections.deque[http.client.HTTPConnection] = collections.deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections; calls in progress fail."""
        self._channel.close()
        while self._idle:
            self._idle.pop().close()

    def register(
        self,
        name: str,
        uri: str,
        type: str,
        *,
        key: str = "",
        load: bool = False,
        sync: bool = True,
        timeout_s: float | None = None,
    ) -> ModelStatus:
        """Register a model; with `load` have it loaded now and, if `sync`, wait for it.

        The same registration again is fine; another one under the same name is ALREADY_EXISTS.
        """
        return self._send(calls.register(ModelSpec(name, uri, type, key), load=load, sync=sync), timeout_s)

    def register_many(
        self,
        specs: Iterable[ModelSpec],
        *,
        batch: int = BATCH_MODELS,
        concurrency: int = 64,
        progress: Progress | None = None,
    ) -> RegisterSummary:
        """Register many models, `batch` in one call. `progress(n)` hears how many are done so far.

        `concurrency` calls may be in flight; calls for many models are fewer by themselves. With a `batch` of 1, or a
        mesh that has no bulk registration, each model has a call of its own. What cannot be registered is in the
        summary; only a wrong argument raises.
        """
        work = self._registration(specs, batch, concurrency, progress)
        done: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
        while True:
            in_flight = 0
            while True:
                while in_flight < work.in_flight_max and (job := work.take()) is not None:
                    future = self._rpc(self._channel, job.call).future(job.call.request, timeout=self.timeout_s)
                    in_flight += 1
                    future.add_done_callback(lambda ended, job=job: done.put((job, ended)))
                if in_flight == 0:
                    break
                job, ended = done.get()
                in_flight -= 1
                work.settle(job, self._outcome(job, ended))
            pause_s = work.next_round()
            if pause_s is None:
                return work.summary()
            time.sleep(pause_s)

    def unregister(self, name: str) -> None:
        """Forget a model: it is unloaded and its name is free. A model that does not exist is no error."""
        self._send(calls.unregister(name))

    def status(self, name: str) -> ModelStatus:
        """How a model is doing; NOT_FOUND is a status, not an error."""
        return self._send(calls.status(name))

    def ensure_loaded(self, name: str, sync: bool = True, *, timeout_s: float | None = None) -> ModelStatus:
        """Have a model loaded, and wait for it if `sync`."""
        return self._send(calls.ensure_loaded(name, sync=sync), timeout_s)

    def set_vmodel(
        self,
        name: str,
        target: str | ModelSpec,
        *,
        owner: str = "",
        load: bool = False,
        sync: bool = True,
        update_only: bool = False,
        force: bool = False,
        auto_delete: bool = False,
        expected_target: str = "",
        timeout_s: float | None = None,
    ) -> VModelStatus:
        """Create the vmodel `name`, or have it go over to another model; then it answers for `predict(name, …)`.

        `target` is a registered model's name, or a spec to register (`auto_delete`: to be unregistered when no vmodel
        uses it any more). The model that answered so far goes on until the target is loaded, unless `force`; a target
        that does not load is a status (TRANSITION_FAILED), no error. With `sync` this is waited for. `load`: load the
        target even if nobody uses the vmodel now. `expected_target`: only if that is its target now; `owner`, if given,
        must be the vmodel's. (A vmodel with the name of a registered model can be asked by header only.)
        """
        call = calls.set_vmodel(
            name,
            target,
            owner=owner,
            load=load,
            sync=sync,
            update_only=update_only,
            force=force,
            auto_delete=auto_delete,
            expected_target=expected_target,
        )
        return self._send(call, timeout_s)

    def delete_vmodel(self, name: str, *, owner: str = "") -> None:
        """Delete a vmodel, and the models that were to go with it. One that does not exist is no error.

        With `owner`, one that is somebody else's is left alone.
        """
        self._send(calls.delete_vmodel(name, owner=owner))

    def vmodel_status(self, name: str, *, owner: str = "") -> VModelStatus:
        """How a vmodel is doing; NOT_FOUND is a status, not an error (also for an owner who is not its owner)."""
        return self._send(calls.vmodel_status(name, owner=owner))

    def predict(
        self, name: str, inputs: Mapping[str, Any] | Any, *, outputs: Sequence[str] = (), timeout_s: float | None = None
    ) -> Prediction:
        """Ask a model. `inputs` are arrays by name, or one array for the model's single input.

        The arrays' dtypes and shapes are what is sent: str, bytes and object arrays as BYTES, everything else as it
        is. `outputs` names the outputs wanted (empty: all).
        """
        return self._send(calls.predict(self.protocol, name, inputs, outputs), timeout_s)

    def metadata(self, name: str) -> dict[str, Any]:
        """What a model takes and gives: ``{"name", "platform", "inputs": [{name, datatype, shape}], "outputs"}``."""
        return self._send(calls.metadata(self.protocol, name))

    def list(self) -> Models:
        """Every model: ``{"name", "type", "state", "size_bytes", "instances"}`` each, by name."""
        models, after = self._send(calls.list_page(""))
        while after:
            page, after = self._send(calls.list_page(after))
            models += page
        return models

    def ready(self) -> bool:
        """Whether a mesh answers here and takes requests."""
        try:
            return self._send(calls.ready(self.protocol), retries=0)
        except MeshError as error:
            if error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
                return False
            raise

    def _send(self, call: Call[T], timeout_s: float | None = None, *, retries: int | None = None) -> T:
        deadline = self._deadline(timeout_s)
        for attempt in itertools.count():
            left_s = max(0.001, deadline - time.monotonic())
            try:
                return self._send_rpc(call, left_s) if isinstance(call, RpcCall) else self._send_http(call, left_s)
            except MeshError as error:
                time.sleep(self._pause_s(error, attempt, deadline, self.retries if retries is None else retries))
        raise AssertionError("unreachable")

    def _send_rpc(self, call: RpcCall[T], timeout_s: float) -> T:
        try:
            answer, done = self._rpc(self._channel, call).with_call(call.request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise self._rpc_error(error) from None
        return call.read(answer, as_mapping(done.initial_metadata()))

    def _outcome(self, job: Job, ended: Any) -> tuple[MeshError | None, ...] | MeshError:
        """What a registration that has ended came to."""
        if ended.code() is not grpc.StatusCode.OK:
            return self._rpc_error(ended)
        try:
            return job.call.read(ended.result(), {})
        except MeshError as error:
            return error

    def _send_http(self, call: HttpCall[T], timeout_s: float) -> T:
        deadline = time.monotonic() + timeout_s
        try:
            kept = self._idle.pop()
        except IndexError:
            kept = None
        try:
            if kept is not None:
                try:
                    return self._exchange(kept, call, timeout_s)
                except (ConnectionError, http.client.HTTPException):
                    # A kept connection that the mesh closed meanwhile shows only when it is used: once more at once.
                    timeout_s = max(0.001, deadline - time.monotonic())
            return self._exchange(http.client.HTTPConnection(self._host, self._port), call, timeout_s)
        except TimeoutError:
            raise MeshError(Code.DEADLINE_EXCEEDED, f"no answer from {self.target} in time") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None

    def _exchange(self, connection: http.client.HTTPConnection, call: HttpCall[T], timeout_s: float) -> T:
        connection.timeout = timeout_s
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        try:
            connection.request(call.method, call.path, call.body or None, dict(call.headers))
            answer = connection.getresponse()
            body = answer.read()
        except BaseException:
            connection.close()
            raise
        if answer.will_close or len(self._idle) >= _IDLE_CONNECTIONS_MAX:
            connection.close()
        else:
            self._idle.append(connection)
        headers = {name.lower(): value for name, value in answer.getheaders()}
        if answer.status != 200:
            raise calls.http_error(answer.status, headers, body)
        return call.read(body, headers)
