"""The client of a mesh for the coroutines of one event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import grpc.aio
import yarl

from raymesh.mesh import client_calls as calls
from raymesh.mesh.client_base import BATCH_MODELS, CHANNEL_OPTIONS, ClientBase, Models, as_mapping
from raymesh.mesh.client_bulk import Progress
from raymesh.mesh.client_calls import (
    Call,
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

T = TypeVar("T")


class AsyncClient(ClientBase):
    """A mesh, for the coroutines of one event loop. Use it as an async context manager, or `await close()`.

    The methods are those of `Client`, to be awaited.
    """

    def __init__(
        self, target: str = "127.0.0.1:8033", *, protocol: str = "grpc", timeout_s: float = 60.0, retries: int = 1
    ) -> None:
        super().__init__(target, protocol=protocol, timeout_s=timeout_s, retries=retries)
        # Both belong to the event loop that is running when they are first used.
        self._channel: grpc.aio.Channel | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections; calls in progress fail."""
        channel, self._channel = self._channel, None
        session, self._session = self._session, None
        self._rpcs.clear()
        if channel is not None:
            await channel.close()
        if session is not None:
            await session.close()

    async def register(
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
        """See `Client.register`."""
        return await self._send(calls.register(ModelSpec(name, uri, type, key), load=load, sync=sync), timeout_s)

    async def register_many(
        self,
        specs: Iterable[ModelSpec],
        *,
        batch: int = BATCH_MODELS,
        concurrency: int = 64,
        progress: Progress | None = None,
    ) -> RegisterSummary:
        """See `Client.register_many`."""
        work = self._registration(specs, batch, concurrency, progress)

        async def send() -> None:
            while (job := work.take()) is not None:
                outcome: tuple[MeshError | None, ...] | MeshError
                try:
                    outcome = await self._send_rpc(job.call, self.timeout_s)
                except MeshError as error:
                    outcome = error
                work.settle(job, outcome)

        while True:
            async with asyncio.TaskGroup() as senders:
                for _ in range(work.in_flight_max):
                    senders.create_task(send())
            pause_s = work.next_round()
            if pause_s is None:
                return work.summary()
            await asyncio.sleep(pause_s)

    async def unregister(self, name: str) -> None:
        """See `Client.unregister`."""
        await self._send(calls.unregister(name))

    async def status(self, name: str) -> ModelStatus:
        """See `Client.status`."""
        return await self._send(calls.status(name))

    async def ensure_loaded(self, name: str, sync: bool = True, *, timeout_s: float | None = None) -> ModelStatus:
        """See `Client.ensure_loaded`."""
        return await self._send(calls.ensure_loaded(name, sync=sync), timeout_s)

    async def set_vmodel(
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
        """See `Client.set_vmodel`."""
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
        return await self._send(call, timeout_s)

    async def delete_vmodel(self, name: str, *, owner: str = "") -> None:
        """See `Client.delete_vmodel`."""
        await self._send(calls.delete_vmodel(name, owner=owner))

    async def vmodel_status(self, name: str, *, owner: str = "") -> VModelStatus:
        """See `Client.vmodel_status`."""
        return await self._send(calls.vmodel_status(name, owner=owner))

    async def predict(
        self, name: str, inputs: Mapping[str, Any] | Any, *, outputs: Sequence[str] = (), timeout_s: float | None = None
    ) -> Prediction:
        """See `Client.predict`."""
        return await self._send(calls.predict(self.protocol, name, inputs, outputs), timeout_s)

    async def metadata(self, name: str) -> dict[str, Any]:
        """See `Client.metadata`."""
        return await self._send(calls.metadata(self.protocol, name))

    async def list(self) -> Models:
        """See `Client.list`."""
        models, after = await self._send(calls.list_page(""))
        while after:
            page, after = await self._send(calls.list_page(after))
            models += page
        return models

    async def ready(self) -> bool:
        """See `Client.ready`."""
        try:
            return await self._send(calls.ready(self.protocol), retries=0)
        except MeshError as error:
            if error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED):
                return False
            raise

    async def _send(self, call: Call[T], timeout_s: float | None = None, *, retries: int | None = None) -> T:
        deadline = self._deadline(timeout_s)
        for attempt in itertools.count():
            left_s = max(0.001, deadline - time.monotonic())
            try:
                if isinstance(call, RpcCall):
                    return await self._send_rpc(call, left_s)
                return await self._send_http(call, left_s)
            except MeshError as error:
                pause_s = self._pause_s(error, attempt, deadline, self.retries if retries is None else retries)
                await asyncio.sleep(pause_s)
        raise AssertionError("unreachable")

    async def _send_rpc(self, call: RpcCall[T], timeout_s: float) -> T:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.target, options=CHANNEL_OPTIONS)
        started = self._rpc(self._channel, call)(call.request, timeout=timeout_s)
        try:
            answer = await started
            metadata = await started.initial_metadata()
        except grpc.aio.AioRpcError as error:
            raise self._rpc_error(error) from None
        return call.read(answer, as_mapping(metadata))

    async def _send_http(self, call: HttpCall[T], timeout_s: float) -> T:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        deadline = time.monotonic() + timeout_s
        try:
            try:
                status, headers, body = await self._exchange(self._session, call, timeout_s)
            except aiohttp.ServerDisconnectedError:
                # A kept connection that the mesh closed meanwhile shows only when it is used: once more at once.
                left_s = max(0.001, deadline - time.monotonic())
                status, headers, body = await self._exchange(self._session, call, left_s)
        except TimeoutError:
            raise MeshError(Code.DEADLINE_EXCEEDED, f"no answer from {self.target} in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from None
        if status != 200:
            raise calls.http_error(status, headers, body)
        return call.read(body, headers)

    async def _exchange(
        self, session: aiohttp.ClientSession, call: HttpCall[Any], timeout_s: float
    ) -> tuple[int, dict[str, str], bytes]:
        async with session.request(
            call.method,
            # Encoded already; aiohttp would decode the `%2F` in a model's name.
            yarl.URL(f"http://{self.target}{call.path}", encoded=True),
            data=call.body or None,
            headers=call.headers,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            allow_redirects=False,
        ) as answer:
            body = await answer.read()
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, body
