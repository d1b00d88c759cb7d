"""gRPC unary calls carried over HTTP/1.1, the way the front door hands them to us.

The front door speaks HTTP/2 to clients and HTTP/1.1 to the mesh. A unary call is a POST whose body is one
length-prefixed message; a good answer is chunked with ``grpc-status`` in the HTTP/1.1 trailers, an error is a
trailers-only answer: status 200, ``grpc-status`` and ``grpc-message`` as headers, no body.
(Framing: grpc/grpc doc/PROTOCOL-HTTP2.md.)
"""

from __future__ import annotations

import zlib
from urllib.parse import quote

from raymesh.runtimes.errors import Code, InvalidInput, RequestError

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

    Raises `InvalidInput` when it is damaged or cut short, UNIMPLEMENTED for another encoding, RESOURCE_EXHAUSTED as
    soon as it is more than `bytes_max` bytes: a bomb never goes off.
    """
    window = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}.get(encoding)
    if window is None:
        raise RequestError(
            Code.UNIMPLEMENTED, f"unknown encoding {encoding.decode('ascii', 'replace')!r}: use gzip or none"
        )
    inflate = zlib.decompressobj(window)
    try:
        plain = inflate.decompress(data, bytes_max + 1)
    except zlib.error as error:
        raise InvalidInput(f"the compressed message is damaged: {error}") from None
    if len(plain) > bytes_max:
        raise RequestError(Code.RESOURCE_EXHAUSTED, f"the message is larger than {bytes_max} bytes uncompressed")
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


def timeout_s(header: bytes | None) -> float | None:
    """The seconds in a ``grpc-timeout`` header; None when absent or malformed."""
    # The protocol allows eight digits.
    if not header or len(header) > 9 or header[-1:] not in _TIMEOUT_UNITS_S or not header[:-1].isdigit():
        return None
    return int(header[:-1]) * _TIMEOUT_UNITS_S[header[-1:]]
