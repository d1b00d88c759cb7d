"""gRPC over HTTP/1.1: framing, compression with bounds, errors in headers, timeouts."""

from __future__ import annotations

import gzip
import zlib
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymesh.runtimes import grpc_http1
from raymesh.runtimes.errors import Code, InvalidInput, RequestError

MAX = 10_000


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def headers_of(answer: bytes) -> dict[str, str]:
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert rest == b""
    lines = head.decode("ascii").split("\r\n")
    assert lines[0] == "HTTP/1.1 200 OK"
    return dict(line.split(": ", 1) for line in lines[1:])


@given(st.binary(max_size=200))
def test_a_message_comes_out_as_it_went_in(message: bytes) -> None:
    assert grpc_http1.unframe(framed(message), bytes_max=MAX) == message
    for encoding, squeezed in ((b"gzip", gzip.compress(message)), (b"deflate", zlib.compress(message))):
        assert grpc_http1.unframe(framed(squeezed, 1), encoding=encoding, bytes_max=MAX) == message


@given(st.binary(max_size=40), st.sampled_from([b"identity", b"gzip", b"deflate", b"br", b"\xff"]))
def test_any_body_is_a_message_or_an_error_for_the_caller(body: bytes, encoding: bytes) -> None:
    try:
        assert isinstance(grpc_http1.unframe(body, encoding=encoding, bytes_max=MAX), bytes)
    except RequestError as error:
        assert error.code in {Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize(
    "body",
    [b"", b"\0\0\0\0", framed(b"abc")[:-1], framed(b"abc") + b"x", framed(b"a") + framed(b"b"), framed(b"abc", 2)],
)
def test_anything_but_one_message_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        grpc_http1.unframe(body, bytes_max=MAX)


def test_a_message_cut_short_inside_its_compression_is_refused() -> None:
    squeezed = gzip.compress(bytes(range(256)) * 4)
    for damaged in (squeezed[:-9], squeezed[: len(squeezed) // 2], squeezed + b"x", squeezed + squeezed):
        with pytest.raises(InvalidInput, match="damaged"):
            grpc_http1.unframe(framed(damaged, 1), encoding=b"gzip", bytes_max=MAX)


def test_a_decompression_bomb_does_not_go_off() -> None:
    bomb = gzip.compress(bytes(300_000_000), 1)
    with pytest.raises(RequestError) as caught:
        grpc_http1.unframe(framed(bomb, 1), encoding=b"gzip", bytes_max=MAX)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    # The limit itself is allowed.
    fits = gzip.compress(bytes(MAX))
    assert len(grpc_http1.unframe(framed(fits, 1), encoding=b"gzip", bytes_max=MAX)) == MAX


def test_an_answer_is_one_chunk_and_a_trailer() -> None:
    answer = grpc_http1.answer(b"hello", b"x-raymesh-cold: 1\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head and b"\r\nx-raymesh-cold: 1\r\n" in head
    assert body == b"a\r\n\0\0\0\0\5hello\r\n0\r\ngrpc-status: 0\r\n\r\n"


@given(st.text(max_size=3000))
def test_any_message_fits_into_a_header_and_comes_back(message: str) -> None:
    headers = headers_of(grpc_http1.error_answer(RequestError(Code.NOT_FOUND, message, reason="NOT_REGISTERED")))
    assert headers["grpc-status"] == "5" and headers["x-raymesh-reason"] == "NOT_REGISTERED"
    assert unquote(headers["grpc-message"]) == message[:1024]
    assert len(headers["grpc-message"]) <= 12 * 1024


def test_an_error_message_with_half_a_character_is_sent_too() -> None:
    headers = headers_of(grpc_http1.error_answer(RequestError(Code.UNAVAILABLE, "a\ud800b\r\n", retry_after_s=1.5)))
    assert headers["grpc-message"] == "a?b%0D%0A"
    assert headers["grpc-retry-pushback-ms"] == "1500"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (b"1H", 3600.0),
        (b"2M", 120.0),
        (b"3S", 3.0),
        (b"250m", 0.25),
        (b"5u", 5e-6),
        (b"6n", 6e-9),
        (b"99999999H", 99999999 * 3600.0),
        (None, None),
        (b"", None),
        (b"S", None),
        (b"-1S", None),
        (b"1.5S", None),
        (b"1s", None),
        (b"999999999S", None),
        (b"9" * 5000 + b"H", None),
    ],
)
def test_grpc_timeouts(header: bytes | None, seconds: float | None) -> None:
    assert grpc_http1.timeout_s(header) == (None if seconds is None else pytest.approx(seconds))


@given(st.binary(max_size=200))
def test_a_good_answer_is_read_back(message: bytes) -> None:
    head, _, rest = grpc_http1.answer(message, b"x-raymesh-cold: 1\r\n").partition(b"\r\n\r\n")
    assert grpc_http1.read_answer(head, rest) == message
    size, _, chunk = rest.partition(b"\r\n")
    content, trailers = chunk[: int(size, 16)], chunk[int(size, 16) :]
    two = b"2\r\n%b\r\n%x\r\n%b" % (content[:2], len(content) - 2, content[2:])
    assert grpc_http1.read_answer(head, two + trailers) == message


@given(st.sampled_from([code for code in Code if code]), st.text(max_size=50), st.sampled_from(["", "NO_CAPACITY"]))
def test_an_error_is_read_back(code: Code, message: str, reason: str) -> None:
    sent = RequestError(code, message, reason=reason, retry_after_s=1.5)
    head, _, rest = grpc_http1.error_answer(sent).partition(b"\r\n\r\n")
    with pytest.raises(RequestError) as caught:
        grpc_http1.read_answer(head, rest)
    got = caught.value
    assert (got.code, got.reason, got.retry_after_s) == (code, reason, 1.5)
    assert got.message == message.strip(" ")


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_what_is_no_answer_is_an_error(head: bytes, rest: bytes) -> None:
    with pytest.raises(RequestError):
        grpc_http1.read_answer(head, rest)
