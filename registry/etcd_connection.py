"""Calls to an etcd cluster: several endpoints, deadlines, tokens, and which calls may be repeated.

Rule of the file: a request that may have been carried out is repeated only when that cannot do harm, and whoever asked
is told.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import grpc

from raymesh.registry.backoff import Backoff
from raymesh.registry.etcd_wire import Failure, pb, read_failure
from raymesh.registry.store import RegistryDenied, RegistryError, RegistryUnavailable

log = logging.getLogger(__name__)

DEFAULT_PORT = 2379
#: etcd answers with up to this much in one message; gRPC's default of 4 MiB is too small for a page of large values.
RECEIVE_BYTES_MAX = 64 * 1024 * 1024
#: Once no endpoint has answered for this long, calls fail after one try of each instead of waiting for a restart.
_FAIL_FAST_AFTER_S = 1.5

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    # A peer that vanished without closing (a frozen or unplugged machine) is noticed by pings, within 13 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's default waits up to two minutes between attempts; a restarted etcd should be found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Also how long one attempt to connect may take, handshake included.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    # Several stores in one process share nothing, and an environment's proxy is never between us and etcd.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Method(NamedTuple):
    """One method of etcd's API."""

    path: str
    request: Any
    response: Any
    is_stream: bool = False


RANGE = Method("/etcdserverpb.KV/Range", pb.RangeRequest, pb.RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", pb.TxnRequest, pb.TxnResponse)
COMPACT = Method("/etcdserverpb.KV/Compact", pb.CompactionRequest, pb.CompactionResponse)
WATCH = Method("/etcdserverpb.Watch/Watch", pb.WatchRequest, pb.WatchResponse, is_stream=True)
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantRequest, pb.LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeRequest, pb.LeaseRevokeResponse)
KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse, is_stream=True
)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateRequest, pb.AuthenticateResponse)
STATUS = Method("/etcdserverpb.Maintenance/Status", pb.StatusRequest, pb.StatusResponse)


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """Where an etcd cluster is and how to be let in. `endpoints` are ``host:port``; files are PEM."""

    endpoints: tuple[str, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    is_tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    @classmethod
    def from_url(cls, url: str) -> EtcdAddress:
        """Read ``etcd://[user:password@]host[:port][,…]`` or ``etcds://…[?ca=&cert=&key=]``; `ValueError` if odd."""
        parts = urlsplit(url)
        if parts.scheme not in ("etcd", "etcds"):
            raise ValueError("a registry URL begins with etcd:// or etcds://")
        if parts.path not in ("", "/") or parts.fragment:
            raise ValueError("a registry URL has no path: etcd://host:port,host:port")
        login, _, hosts = parts.netloc.rpartition("@")
        user, _, password = login.partition(":")
        endpoints = tuple(_read_endpoint(host) for host in hosts.split(","))
        query = {name: values[-1] for name, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
        files = {name: query.pop(name, "") for name in ("ca", "cert", "key")}
        if query:
            raise ValueError(f"unknown option {min(query)!r} in the registry URL: use ca, cert, key")
        if any(files.values()) and parts.scheme == "etcd":
            raise ValueError("ca, cert and key need etcds://")
        if bool(files["cert"]) != bool(files["key"]):
            raise ValueError("cert and key go together")
        is_tls = parts.scheme == "etcds"
        return cls(endpoints, unquote(user), unquote(password), is_tls, files["ca"], files["cert"], files["key"])

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials, None for plaintext. Reads the files; raises `RegistryDenied` when that fails."""
        if not self.is_tls:
            return None
        try:
            ca, cert, key = (
                Path(name).read_bytes() if name else None for name in (self.ca_file, self.cert_file, self.key_file)
            )
        except OSError as error:
            raise RegistryDenied(f"the registry's TLS files: {error}") from error
        return grpc.ssl_channel_credentials(ca, key, cert)


def _read_endpoint(text: str) -> str:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError("a registry URL needs a host: etcd://host:port")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or DEFAULT_PORT}"


@dataclass(slots=True)
class EtcdStats:
    """What happened so far, for metrics. `rtt_s` is a moving average over successful unary calls, in seconds."""

    calls: int = 0
    failures: int = 0
    failovers: int = 0
    authentications: int = 0
    watch_resumes: int = 0
    rtt_s: float = 0.0


class Endpoint:
    """A channel to one member and the callables made on it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._callables: dict[str, Any] = {}

    def callable(self, method: Method) -> Any:
        """The multi-callable of `method` on this channel."""
        made = self._callables.get(method.path)
        if made is None:
            make = self._channel.stream_stream if method.is_stream else self._channel.unary_unary
            made = self._callables[method.path] = make(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
        return made

    async def close(self) -> None:
        """Close the channel and whatever runs on it."""
        await self._channel.close()


class Answer(NamedTuple):
    """A response; `was_repeated` when an earlier attempt may have been carried out too."""

    response: Any
    was_repeated: bool


class EtcdConnection:
    """Unary calls and streams to whichever endpoint works. Opens channels on first use, in the running loop."""

    def __init__(self, address: EtcdAddress, *, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.stats = EtcdStats()
        self._endpoints: list[Endpoint] = []
        self._current = 0
        self._token = ""
        self._token_lock = asyncio.Lock()
        self._failing_since: float | None = None
        self._is_closed = False

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint in use."""
        if self._is_closed:
            raise RegistryUnavailable("the store is closed")
        if not self._endpoints:
            credentials = self.address.credentials()
            self._endpoints = [Endpoint(address, credentials) for address in self.address.endpoints]
        return self._endpoints[self._current]

    def fail_over(self, failed: Endpoint) -> None:
        """Use the next endpoint from now on, unless another call has already moved on from `failed`."""
        if len(self._endpoints) > 1 and self._endpoints[self._current] is failed:
            self._current = (self._current + 1) % len(self._endpoints)
            self.stats.failovers += 1
            log.warning("registry endpoint %s failed, using %s", failed.address, self.endpoint.address)

    async def call(self, method: Method, request: Any, *, is_repeatable: bool) -> Answer:
        """The answer to `request` within `timeout_s`, from any endpoint.

        `is_repeatable`: it may be sent again although an earlier attempt may have been carried out. Raises
        `RegistryUnavailable` when nobody answered, another `RegistryError` when etcd said no.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout_s
        # One frozen member must not eat the time in which the next could answer.
        attempt_s = self.timeout_s / min(len(self.address.endpoints), 3)
        backoff, was_repeated, tries, token_tries = Backoff(), False, 0, 0
        while True:
            endpoint, began, token = self.endpoint, loop.time(), self._token
            try:
                response = await self._attempt(endpoint, method, request, min(attempt_s, deadline - began))
            except grpc.aio.AioRpcError as error:
                details = error.details() or error.code().name
                failure = read_failure(error.code(), details)
            except TimeoutError:
                details, failure = "no token in time", Failure.NOT_DONE
            else:
                self._note_success(loop.time() - began)
                return Answer(response, was_repeated)
            self.stats.failures += 1
            if isinstance(failure, RegistryError):
                raise failure
            if failure is Failure.TOKEN:
                # Refused, hence not carried out. Twice is enough: the second token was fresh.
                token_tries += 1
                if not self.address.user or token_tries > 2:
                    raise RegistryDenied(details)
                self.drop_token(token)
                continue
            self.fail_over(endpoint)
            tries += 1
            was_repeated |= failure is Failure.UNKNOWN
            pause_s = backoff.next_s() if tries % len(self.address.endpoints) == 0 else 0.0
            if (was_repeated and not is_repeatable) or self._should_give_up(tries, deadline - pause_s):
                raise RegistryUnavailable(f"{method.path.rpartition('/')[2]}: {details}")
            await asyncio.sleep(pause_s)

    async def metadata(self, timeout_s: float) -> tuple[tuple[str, str], ...]:
        """What to send along: the token, fetched now if there is none.

        Raises as a call does (`AioRpcError`), or `TimeoutError`.
        """
        if not self.address.user:
            return ()
        async with asyncio.timeout(timeout_s), self._token_lock:
            if not self._token:
                request = pb.AuthenticateRequest(name=self.address.user, password=self.address.password)
                self._token = (await self.endpoint.callable(AUTHENTICATE)(request, timeout=timeout_s)).token
                self.stats.authentications += 1
        return (("token", self._token),)

    def drop_token(self, token: str) -> None:
        """`token` is of no use any more (an etcd restart forgets them all)."""
        if self._token == token:
            self._token = ""

    @property
    def token(self) -> str:
        """The token in use, if any."""
        return self._token

    async def close(self) -> None:
        """Close every channel."""
        self._is_closed = True
        endpoints, self._endpoints = self._endpoints, []
        for endpoint in endpoints:
            await endpoint.close()

    async def _attempt(self, endpoint: Endpoint, method: Method, request: Any, timeout_s: float) -> Any:
        self.stats.calls += 1
        metadata = await self.metadata(timeout_s)
        if not method.is_stream:
            return await endpoint.callable(method)(request, timeout=timeout_s, metadata=metadata)
        # A stream of one request and one response: how leases are kept alive.
        stream = endpoint.callable(method)((request,), timeout=timeout_s, metadata=metadata)
        try:
            response = await stream.read()
            if response is grpc.aio.EOF:
                raise await error_of(stream)
            return response
        finally:
            stream.cancel()

    def _note_success(self, rtt_s: float) -> None:
        self._failing_since = None
        self.stats.rtt_s += 0.1 * (rtt_s - self.stats.rtt_s)

    def _should_give_up(self, tries: int, deadline: float) -> bool:
        """After each of the endpoints has failed: is it time to tell the caller?"""
        now = asyncio.get_running_loop().time()
        if self._failing_since is None:
            self._failing_since = now
        has_tried_all = tries >= len(self.address.endpoints)
        return now >= deadline or (has_tried_all and now - self._failing_since > _FAIL_FAST_AFTER_S)


async def error_of(stream: Any) -> grpc.aio.AioRpcError:
    """The error a stream ended with; a stream that the server ended politely counts as unavailable."""
    code = await stream.code()
    if code is grpc.StatusCode.OK:
        code = grpc.StatusCode.UNAVAILABLE
    details = await stream.details() or "the stream ended"
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
