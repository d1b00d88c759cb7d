"""gRPC unary calls carried over HTTP/1.1, the way the front door hands them to us.

The front door speaks HTTP/2 to clients and HTTP/1.1 to the mesh. A unary call is a POST whose body is one
length-prefixed message; a good answer is chunked with ``grpc-status`` in the HTTP/1.1 trailers, an error is a
trailers-only answer: status 200, ``grpc-status`` and ``grpc-message`` as headers, no body.
(Framing: grpc/grpc doc/PROTOCOL-HTTP2.md.)
"""

from __future__ import annotations

import zlib
from urllib.parse import quote, unquote

from raymesh.runtimes.errors import Code, InvalidInput, Reason, RequestError, TooLarge, Unavailable, UnknownEncoding

CONTENT_TYPE = b"application/grpc"
INFER_TARGET = b"/inference.GRPCInferenceService/ModelInfer"

_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n%btrailer: grpc-status\r\n"
    b"transfer-encoding: chunked\r\n\r\n%x\r\n\x00%b"
)
_TAIL = b"\r\n0\r\ngrpc-status: 0\r\n\r\n"

#: Longest error message, in characters: one takes up to twelve bytes here, and proxies allow about 16 KB of headers.
_MESSAGE_MAX = 1024
#: ``grpc-timeout`` units in seconds.
_TIMEOUT_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def unframe(body: bytes, *, encoding: bytes = b"identity", bytes_max: int) -> bytes:
    """The one message in a unary body, decompressed. Raises `InvalidInput` when it is anything else."""
    if len(body) < 5 or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise InvalidInput("the gRPC body is not exactly one length-prefixed message")
    if body[0] > 1:
        raise InvalidInput("the gRPC message has unknown flags")
    message = body[5:]
    return decompress(message, encoding, bytes_max=bytes_max) if body[0] else message


def decompress(data: bytes, encoding: bytes, *, bytes_max: int) -> bytes:
    """`data` without its ``gzip`` or ``deflate`` encoding.

    Raises `InvalidInput` when it is damaged or cut short, `UnknownEncoding` for another one, `TooLarge` as soon as it
    is more than `bytes_max` bytes: a bomb never goes off.
    """
    window = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}.get(encoding)
    if window is None:
        raise UnknownEncoding(encoding[:40].decode("ascii", "replace"))
    inflate = zlib.decompressobj(window)
    try:
        plain = inflate.decompress(data, bytes_max + 1)
    except zlib.error as error:
        raise InvalidInput(f"the compressed message is damaged: {error}") from None
    if len(plain) > bytes_max:
        raise TooLarge(bytes_max, "the uncompressed message")
    if not inflate.eof or inflate.unused_data:
        raise InvalidInput("the compressed message is damaged: it does not end where the stream does")
    return plain


def answer(message: bytes, headers: bytes = b"") -> bytes:
    """A whole HTTP/1.1 answer that carries `message`. `headers` are extra header lines, each ending in CRLF."""
    size = len(message)
    return (_HEAD % (headers, size + 5, size.to_bytes(4, "big"))) + message + _TAIL


def error_answer(error: RequestError) -> bytes:
    """A whole trailers-only HTTP/1.1 answer that carries `error`."""
    # Percent-encoding as the protocol wants it: printable ASCII but `%` stays readable.
    message = error.message[:_MESSAGE_MAX]
    text = quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="replace").encode()
    reason = b"x-raymesh-reason: %b\r\n" % error.reason.encode() if error.reason else b""
    if error.retry_after_s:
        reason += b"grpc-retry-pushback-ms: %d\r\n" % round(error.retry_after_s * 1000)
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: %d\r\ngrpc-message: %b\r\n%b"
        b"content-length: 0\r\n\r\n" % (error.code, text, reason)
    )


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def frame(message: bytes) -> bytes:
    """`message` as the body of a unary call: five bytes that say it is not compressed and how long it is, and it."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def read_answer(head: bytes, rest: bytes) -> bytes:
    """The message in an answer as `answer` and `error_answer` make them (`head` without the empty line).

    Raises the `RequestError` the answer carries, `Unavailable` when it is none of ours.
    """
    fields = _fields(head)
    if b"grpc-status" in fields:
        raise _read_error(fields)
    try:
        framed, trailers = _unchunk(rest)
        fields = {**fields, **_fields(trailers)}
        if fields[b"grpc-status"] != b"0":
            raise _read_error(fields)
        return unframe(framed, bytes_max=len(framed))
    except (ValueError, KeyError, InvalidInput):
        raise Unavailable("a part of the mesh did not answer sensibly", reason=Reason.NO_INSTANCE) from None


def _fields(lines: bytes) -> dict[bytes, bytes]:
    """Header or trailer lines by lower-case name."""
    pairs = (line.partition(b":") for line in lines.split(b"\r\n") if b":" in line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _unchunk(data: bytes) -> tuple[bytes, bytes]:
    """The content of a chunked body, and its trailers. Raises `ValueError` when it is none."""
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = data.index(b"\r\n", at)
        size = int(data[at:line_end], 16)
        at = line_end + 2
        if size == 0:
            return b"".join(parts), data[at:]
        parts.append(data[at : at + size])
        at += size + 2


def _read_error(fields: dict[bytes, bytes]) -> RequestError:
    try:
        code = Code(int(fields[b"grpc-status"]))
        pushback_ms = int(fields.get(b"grpc-retry-pushback-ms", b"0"))
    except ValueError:
        code, pushback_ms = Code.UNKNOWN, 0
    return RequestError(
        code,
        unquote(fields.get(b"grpc-message", b"").decode("latin-1")),
        reason=fields.get(b"x-raymesh-reason", b"").decode("latin-1"),
        retry_after_s=pushback_ms / 1000,
    )


def timeout_s(header: bytes | None) -> float | None:
    """The seconds in a ``grpc-timeout`` header; None when absent or malformed."""
    # The protocol allows eight digits.
    if not header or len(header) > 9 or header[-1:] not in _TIMEOUT_UNITS_S or not header[:-1].isdigit():
        return None
    return int(header[:-1]) * _TIMEOUT_UNITS_S[header[-1:]]
