"""gRPC unary calls carried over HTTP/1.1, the way the front door hands them to us.

The front door speaks HTTP/2 to clients and HTTP/1.1 to the mesh. A unary call is a POST whose body is one
length-prefixed message; a good answer is chunked with ``grpc-status`` in the HTTP/1.1 trailers, an error is a
trailers-only answer: status 200, ``grpc-status`` and ``grpc-message`` as headers, no body.
(Framing: grpc/grpc doc/PROTOCOL-HTTP2.md.)
"""

from __future__ import annotations

import gzip
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

#: ``grpc-timeout`` units in seconds.
_TIMEOUT_UNITS_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


def unframe(body: bytes, *, encoding: bytes = b"identity", bytes_max: int) -> bytes:
    """The one message in a unary body, decompressed. Raises `InvalidInput` when it is anything else."""
    if len(body) < 5 or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise InvalidInput("the gRPC body is not exactly one length-prefixed message")
    message = body[5:]
    return message if body[0] == 0 else _decompress(message, encoding, bytes_max)


def _decompress(message: bytes, encoding: bytes, bytes_max: int) -> bytes:
    if encoding not in {b"gzip", b"deflate"}:
        raise RequestError(Code.UNIMPLEMENTED, f"grpc-encoding {encoding.decode('ascii', 'replace')!r}: use gzip")
    try:
        inflate = zlib.decompressobj(16 + zlib.MAX_WBITS if encoding == b"gzip" else zlib.MAX_WBITS)
        plain = inflate.decompress(message, bytes_max + 1)
    except (zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInput(f"the compressed gRPC message is damaged: {error}") from None
    if len(plain) > bytes_max:
        raise RequestError(Code.RESOURCE_EXHAUSTED, f"the message is larger than {bytes_max} bytes uncompressed")
    return plain


def answer(message: bytes, headers: bytes = b"") -> bytes:
    """A whole HTTP/1.1 answer that carries `message`. `headers` are extra header lines, each ending in CRLF."""
    size = len(message)
    return (_HEAD % (headers, size + 5, size.to_bytes(4, "big"))) + message + _TAIL


def error_answer(error: RequestError) -> bytes:
    """A whole trailers-only HTTP/1.1 answer that carries `error`."""
    # Percent-encoding as the protocol wants it: printable ASCII but `%` stays readable.
    text = quote(error.message[:4096], safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode()
    reason = b"x-raymesh-reason: %b\r\n" % error.reason.encode() if error.reason else b""
    if error.retry_after_s:
        reason += b"grpc-retry-pushback-ms: %d\r\n" % round(error.retry_after_s * 1000)
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: %d\r\ngrpc-message: %b\r\n%b"
        b"content-length: 0\r\n\r\n" % (error.code, text, reason)
    )


def timeout_s(header: bytes | None) -> float | None:
    """The seconds in a ``grpc-timeout`` header; None when absent or malformed."""
    if not header or header[-1:] not in _TIMEOUT_UNITS_S or not header[:-1].isdigit():
        return None
    return int(header[:-1]) * _TIMEOUT_UNITS_S[header[-1:]]
