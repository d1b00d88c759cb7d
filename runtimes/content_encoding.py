"""``Content-Encoding`` and ``Accept-Encoding`` of REST bodies: gzip and deflate.

Rule of the file: pure, and bounded: what is inflated never becomes larger than it may.
"""

from __future__ import annotations

import zlib

from raymesh.runtimes import grpc_http1

#: Answers smaller than this are sent as they are: they fit a few packets, and compressing takes longer than sending.
JSON_BYTES_MIN = 32 * 1024
#: Most of the gain at a fraction of the time of higher levels; others wait meanwhile.
_LEVEL = 1
#: How our names for the encodings map to zlib's window sizes. ``deflate`` is the zlib format, as HTTP says.
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_NAMES = {b"gzip": b"gzip", b"x-gzip": b"gzip", b"deflate": b"deflate"}
_HEADER_MAX = 1024


def accepted(header: bytes | None) -> bytes:
    """The encoding to answer in by an ``Accept-Encoding`` header: ``gzip``, ``deflate``, or nothing."""
    if not header or len(header) > _HEADER_MAX:
        return b""
    found = set()
    for part in header.lower().split(b","):
        name, _, weight = part.partition(b";")
        name = name.strip()
        # `q=0` refuses; how much one of them is preferred otherwise makes no difference to us.
        if weight.replace(b" ", b"").rstrip(b"0.") != b"q=":
            found.add(b"gzip" if name == b"*" else _NAMES.get(name, b""))
    return b"gzip" if b"gzip" in found else b"deflate" if b"deflate" in found else b""


def decode_body(body: bytes, header: bytes, *, bytes_max: int) -> bytes:
    """`body` without the encoding of a ``Content-Encoding`` header.

    Raises `InvalidInput` when it is damaged, `UnknownEncoding` (several are one), `TooLarge` when
    it is larger than `bytes_max`.
    """
    name = header.strip().lower()
    if name in {b"", b"identity"}:
        return body
    return grpc_http1.decompress(body, _NAMES.get(name, name), bytes_max=bytes_max)


def encode_body(body: bytes, encoding: bytes) -> bytes:
    """`body` in `encoding`, one that `accepted` gave."""
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOWS[encoding])
    return deflate.compress(body) + deflate.flush()
