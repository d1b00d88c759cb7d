"""Encodings of REST bodies."""

from __future__ import annotations

import contextlib
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymesh.runtimes.content_encoding import accepted, decode_body, encode_body
from raymesh.runtimes.errors import Code, RequestError


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, b""),
        (b"", b""),
        (b"gzip", b"gzip"),
        (b"GZip, deflate, br", b"gzip"),
        (b"deflate;q=0.5, br", b"deflate"),
        (b"gzip;q=0, deflate", b"deflate"),
        (b"gzip; q=0.000", b""),
        (b"gzip;q=0.001", b"gzip"),
        (b"*", b"gzip"),
        (b"identity", b""),
        (b"gzip," * 1000, b""),
    ],
)
def test_what_a_client_accepts(header, expected):
    assert accepted(header) == expected


@given(st.binary(), st.sampled_from([b"gzip", b"deflate"]))
def test_there_and_back(body, encoding):
    assert decode_body(encode_body(body, encoding), encoding, bytes_max=len(body)) == body


@given(st.binary(max_size=100))
def test_any_header_is_read(header):
    assert accepted(header) in {b"", b"gzip", b"deflate"}
    with contextlib.suppress(RequestError):
        decode_body(b"x", header, bytes_max=10)


def test_what_others_encode():
    for encoded, name in ((gzip.compress(b"a"), b"X-GZIP"), (zlib.compress(b"a"), b" deflate"), (b"a", b"identity")):
        assert decode_body(encoded, name, bytes_max=1) == b"a"


def test_a_bomb_does_not_go_off():
    with pytest.raises(RequestError, match="message_bytes_max") as caught:
        decode_body(gzip.compress(bytes(10_000_000)), b"gzip", bytes_max=1000)
    assert (caught.value.code, caught.value.http_status) == (Code.RESOURCE_EXHAUSTED, 413)


@pytest.mark.parametrize(("header", "code"), [(b"br", 12), (b"gzip, gzip", 12), (b"gzip", 3)])
def test_what_cannot_be_decoded(header, code):
    with pytest.raises(RequestError) as caught:
        decode_body(b"plain", header, bytes_max=1000)
    assert caught.value.code == code
