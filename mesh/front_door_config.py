"""HAProxy's configuration for the front door, as a pure function of a few settings.

Rule of the file: no I/O. What changes while the mesh runs (addresses, routes) is not in here; it is written over the
admin socket (`front_door_table`), so the configuration of a mesh is fixed and HAProxy is never reloaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

from raymesh.mesh.config import Settings
from raymesh.registry.keys import DEFAULT_TENANT, ID_PATTERN

#: File names inside the front door's state directory; HAProxy runs with that directory as its working directory.
ADMIN_SOCKET = "admin.sock"
ROUTES_LUA = "routes.lua"

GRPC_INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"
#: gRPC's frame: one byte of flags, four bytes of length.
_FRAME_BYTES = 5
#: Bytes of a message that name its model for sure: field 1's tag and length (3) and an id (128 at most).
_NAME_BYTES = 200

#: What HAProxy says itself: HTTP status -> (text for the client, gRPC code).
_ERRORS: dict[int, tuple[str, int]] = {
    400: ("malformed request", 3),
    408: ("the request did not arrive in time", 4),
    413: ("request body is larger than the limit of {body_bytes_max} bytes; raise message_bytes_max to accept it", 8),
    500: ("internal error in the front door", 13),
    502: ("the server broke off its answer; try again", 14),
    503: ("no server can take this request now; try again", 14),
    504: ("the server did not answer in time", 4),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrontDoorConfig:
    """What one front door runs with."""

    host: str = "127.0.0.1"
    port: int = 8033
    #: Shown to runtimes and gateways with every request; letters, digits, ``-`` and ``_``.
    token: str = ""
    #: Largest request body by its declared length, in bytes; bodies of unknown length are limited where they end.
    body_bytes_max: int = 64 * 1024 * 1024
    #: Runtime processes that can be routed to directly; further ones are reached through the gateway.
    slots: int = 256
    threads: int = 1
    #: File descriptors the process may open (its hard limit).
    fds_max: int = 20_000
    #: Longest a client may take for its request's headers.
    header_timeout_s: int = 10
    #: Longest silence of a server or client in a request. Deadlines are enforced by runtimes and gateway.
    server_timeout_s: int = 600
    #: How long an idle client connection is kept.
    idle_timeout_s: int = 300
    #: A front door outlives its gateway; with neither a gateway nor a runtime for this long, its mesh is gone: it ends.
    alone_max_s: int = 60
    #: One buffer, in bytes. A request that fits can be tried again elsewhere when its runtime dies in mid-request.
    buffer_bytes: int = 16_384
    #: Requests in flight on one HTTP/2 connection. HAProxy's own 100 makes a busy gRPC channel queue in the client.
    streams_max: int = 256
    #: HTTP/2 flow-control window of one request body: upload speed over a long line is at most this per round trip.
    window_bytes: int = 1024 * 1024

    @classmethod
    def from_settings(cls, settings: Settings, *, fds_max: int) -> FrontDoorConfig:
        """The front door of a mesh with these settings."""
        return cls(
            host=settings.host,
            port=settings.port,
            token=settings.internal_token,
            body_bytes_max=settings.message_bytes_max,
            fds_max=fds_max,
        )

    @property
    def connections_max(self) -> int:
        """``global maxconn``: HAProxy takes two descriptors for each, and one for each server's health check."""
        return min(50_000, max(100, (self.fds_max - self.slots - 100) // 2))


def config_digest(config: FrontDoorConfig, routes_lua: str) -> str:
    """Names a configuration, Lua included: a running HAProxy with the same digest can be adopted."""
    return hashlib.sha256((_render_body(config) + routes_lua).encode()).hexdigest()[:16]


def render_config(config: FrontDoorConfig, digest: str = "") -> str:
    """The text of ``haproxy.cfg``. `digest` is shown by ``show info``, so a running process says what it runs with.

    Raises `ValueError` on values that would break the file.
    """
    return _render_body(config).replace("    description raymesh\n", f"    description raymesh-{digest}\n", 1)


def _render_body(config: FrontDoorConfig) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]*", config.token):
        raise ValueError("internal token: use only letters, digits, - and _")
    if not re.fullmatch(r"[A-Za-z0-9.:_*-]+", config.host):
        raise ValueError(f"host {config.host!r}: use an IP address or a host name")
    if not 0 < config.port < 65_536:
        raise ValueError(f"port {config.port}: use 1 to 65535")
    if config.slots < 1 or config.threads < 1:
        raise ValueError("slots and threads: use 1 or more")
    return "\n".join([_global(config), _defaults(config), _frontend(config), _backends(config)])


def _global(config: FrontDoorConfig) -> str:
    return f"""\
global
    description raymesh
    nbthread {config.threads}
    maxconn {config.connections_max}
    # Without it a second process could bind the same port unnoticed and get half of the connections.
    noreuseport
    stats socket unix@{ADMIN_SOCKET} mode 600 level admin
    stats timeout 60s
    setenv RAYMESH_ALONE_MAX_S {config.alone_max_s}
    # One table for all threads, hence not lua-load-per-thread.
    lua-load {ROUTES_LUA}
    tune.bufsize {config.buffer_bytes}
    tune.h2.fe.max-concurrent-streams {config.streams_max}
    tune.h2.be.max-concurrent-streams {config.streams_max}
    tune.h2.fe.initial-window-size {config.window_bytes}
    tune.h2.be.initial-window-size {config.window_bytes}
"""


def _defaults(config: FrontDoorConfig) -> str:
    # A gRPC answer has no body, hence the expression: `txn.rest` is set for REST only. The last argument of `iif` is
    # never used but may not be empty.
    errors = []
    for status, (text, _) in _ERRORS.items():
        body = '{\\"error\\":\\"' + text.format(body_bytes_max=config.body_bytes_max) + '\\"}'
        extra = " hdr x-raymesh-reason NO_INSTANCE hdr retry-after 1" if status == 503 else ""
        errors.append(
            f"    http-error status {status} content-type application/json "
            f"lf-string \"%[var(txn.rest),iif('{body}','-')]\"{extra}"
        )
    return f"""\
defaults
    mode http
    timeout connect 1s
    timeout client {config.server_timeout_s}s
    timeout server {config.server_timeout_s}s
    timeout http-request {config.header_timeout_s}s
    timeout http-keep-alive {config.idle_timeout_s}s
    http-reuse always
    option http-ignore-probes
{chr(10).join(errors)}
"""


def _frontend(config: FrontDoorConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    id_pattern = ID_PATTERN.pattern.removesuffix("$")
    token = f"    http-request set-header x-raymesh-token {config.token}\n" if config.token else ""
    return f"""\
frontend door
    # Half of the descriptors are left for connections to servers: one HTTP/2 client can use many of them.
    maxconn {config.connections_max // 2}
    bind {host}:{config.port}

    acl grpc req.hdr(content-type) -m beg application/grpc
    acl grpc_infer path {GRPC_INFER_PATH}
    acl v2_infer path_beg /v2/models/
    acl v2_infer_end path_end /infer
    acl v1_infer path_beg /v1/models/
    acl v1_infer_end path_end :predict
    acl has_id var(txn.id) -m found
    # \\z, not $: that would let a newline through, and this guards a header.
    acl valid_id var(txn.id) -m reg '{id_pattern}\\z'

    http-request del-header x-raymesh- -m beg
{token}    http-request set-var(txn.tenant) str({DEFAULT_TENANT})
    http-request set-var(txn.rest) bool(true) unless grpc
    http-request deny deny_status 413 if {{ req.body_size gt {config.body_bytes_max + _FRAME_BYTES} }}

    # Is it an inference? Only these are routed by model.
    http-request set-var(txn.infer) str(grpc) if grpc_infer
    http-request set-var(txn.infer) str(v2) if METH_POST v2_infer v2_infer_end
    http-request set-var(txn.infer) str(v1) if METH_POST v1_infer v1_infer_end
    # An HTTP/1.1 client that asks first is told here to go on, so that no server needs to know about it.
    http-request wait-for-body time {config.header_timeout_s}s at-least 1 if {{ req.hdr(expect) -m found }}
    http-request wait-for-body time {config.header_timeout_s}s at-least {_FRAME_BYTES + _NAME_BYTES} if grpc_infer
    http-request deny deny_status 413 if grpc_infer {{ req.body,bytes(1,4),hex,hex2i gt {config.body_bytes_max} }}

    # Which model, or which vmodel? Headers come first; a `-bin` one is base64, with or without padding (of an id that
    # is valid both alphabets of base64 make the same). Both kinds at once are an error that the gateway tells.
    acl infer var(txn.infer) -m found
    acl has_vid var(txn.vid) -m found
    acl valid_vid var(txn.vid) -m reg '{id_pattern}\\z'
    http-request set-var(txn.vid) req.hdr(mm-vmodel-id) if infer
    http-request set-var(txn.vid) req.hdr(mm-vmodel-id-bin),field(1,=),ub64dec if infer !has_vid
    http-request set-var(txn.id) req.hdr(mm-model-id) if infer
    http-request set-var(txn.id) req.hdr(mm-model-id-bin),field(1,=),ub64dec if infer !has_id
    http-request set-var(txn.id) req.hdr(tas-model-id) if infer !has_id
    http-request set-var(txn.infer) str(odd) if has_id has_vid
    http-request set-var(txn.id) req.body,bytes({_FRAME_BYTES},{_NAME_BYTES}),lua.grpc_model \
if grpc_infer !has_id !has_vid {{ req.body,bytes(0,1),hex 00 }}
    http-request set-var(txn.id) path,field(4,/),url_dec if {{ var(txn.infer) -m str v2 }} !has_id !has_vid
    http-request set-var(txn.id) path,field(4,/),field(1,:),url_dec if {{ var(txn.infer) -m str v1 }} !has_id !has_vid
    http-request unset-var(txn.id) if !valid_id || has_vid
    http-request unset-var(txn.vid) if !valid_vid || {{ var(txn.infer) -m str odd }}
    http-request set-var(txn.key) var(txn.tenant),concat(/,txn.id) if has_id
    http-request set-header x-raymesh-model %[var(txn.key)] if has_id
    http-request set-header x-raymesh-vmodel %[var(txn.tenant),concat(/,txn.vid)] if has_vid
    http-request set-var(txn.key) var(txn.tenant),concat(/@,txn.vid) if has_vid
    http-request set-var(txn.srv) var(txn.key),lua.route if {{ var(txn.key) -m found }}
    # A route that leads through a vmodel says to which model: "server:tenant/model". The vmodel may be named like a
    # model, in a path or a body.
    acl by_vmodel var(txn.srv) -m sub :
    http-request set-header x-raymesh-vmodel %[var(txn.key)] if by_vmodel !has_vid
    http-request set-header x-raymesh-model %[var(txn.srv),field(2,:)] if by_vmodel
    http-request set-var(txn.srv) var(txn.srv),field(1,:) if by_vmodel

    use_backend runtimes if {{ var(txn.srv) -m found }}
    use_backend gateway_data if {{ var(txn.infer) -m found }}
    use_backend gateway_grpc if grpc
    default_backend gateway_rest

{_grpc_errors(config)}"""


def _grpc_errors(config: FrontDoorConfig) -> str:
    """Rules that make errors of HAProxy's own into gRPC's trailers-only answers."""
    # The status comes first: for good answers that one look is all a rule costs.
    unanswered = "!{ status 200 } !{ var(txn.rest) -m found } !{ res.hdr(grpc-status) -m found }"
    lines = [f"    http-after-response set-header content-type application/grpc if {unanswered}"]
    for status, (text, code) in _ERRORS.items():
        text = text.format(body_bytes_max=config.body_bytes_max)
        lines += [
            f"    http-after-response set-header grpc-message '{text}' if {unanswered} {{ status {status} }}",
            f"    http-after-response set-header grpc-status {code} if {unanswered} {{ status {status} }}",
        ]
    lines.append("    http-after-response set-status 200 if !{ status 200 } { res.hdr(grpc-status) -m found }")
    return "\n".join(lines) + "\n"


def _backends(config: FrontDoorConfig) -> str:
    # Servers start disabled at an address nobody listens on; the admin socket gives them theirs.
    nowhere = "127.0.0.1:1 disabled"
    check = "check inter 1s fastinter 100ms downinter 250ms fall 1 rise 1"
    return f"""\
backend runtimes
    # Time for one SYN retransmission (1 s): a full listen queue is no reason to take a runtime down.
    timeout connect 1500ms
    retries 2
    option redispatch 1
    retry-on conn-failure empty-response
    use-server %[var(txn.srv)] if {{ var(txn.srv) -m found }}
    default-server {check} observe layer4 error-limit 1 on-error mark-down
    # Weight 0: picked by name only, so what is meant for a dead runtime goes to the gateway, not to another runtime.
    server-template r 0-{config.slots - 1} {nowhere} weight 0
    # Named twice, because with a single server to fall back on HAProxy waits for up to 1 s before it tries that one.
    server g0 {nowhere}
    server g1 {nowhere}

backend gateway_data
    retries 3
    retry-on conn-failure empty-response
    server g0 {nowhere} {check}

backend gateway_grpc
    # Management calls are not repeated once they were sent.
    retries 3
    server g0 {nowhere} {check} proto h2

backend gateway_rest
    retries 3
    server g0 {nowhere} {check}
"""
