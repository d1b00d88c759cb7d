"""The load generators count what came back, and notice what did not."""

import asyncio
from pathlib import Path

import pytest

from closed_loop import Question, drive, each_once
from h2load import Load, is_installed, read_output, run_h2load

H2LOAD_OUTPUT = """
finished in 1.32s, 15156.04 req/s, 1.05MB/s
requests: 20000 total, 20000 started, 20000 done, 19990 succeeded, 10 failed, 0 errored, 0 timeout
status codes: 19990 2xx, 0 3xx, 0 4xx, 10 5xx
traffic: 1.39MB (1459996) total, 20.19KB (20676) headers (space savings 97.45%), 1.02MB (1069465) data
                     min         max         mean         sd        +/- sd
time for request:      812us     15.49ms      4.19ms      1.22ms    71.25%
"""


def test_the_output_of_h2load_is_read() -> None:
    load = read_output(H2LOAD_OUTPUT)
    assert load == Load(requests=20000, requests_per_s=15156.04, status_2xx=19990, data_bytes=1069465, mean_ms=4.19)
    with pytest.raises(ValueError, match="2xx"):
        load.check(100)
    with pytest.raises(ValueError, match="cannot read"):
        read_output("no such host")


def test_errors_without_a_body_are_noticed() -> None:
    # A gRPC error is a 200 without a body.
    with pytest.raises(ValueError, match="bytes"):
        Load(requests=10, requests_per_s=1, status_2xx=10, data_bytes=90, mean_ms=1).check(10)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers `GET /STATUS/BODY`, in two pieces, so that answers have to be put together."""
    try:
        while line := await reader.readline():
            await reader.readuntil(b"\r\n")
            _, status, body = line.split()[1].decode().split("/")
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body[:1]}".encode())
            await writer.drain()
            writer.write(body[1:].encode())
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()


def test_the_closed_loop_client_tells_right_from_wrong_and_failed() -> None:
    def ask(status: int, body: str) -> Question:
        return Question(f"GET /{status}/{body} HTTP/1.1\r\n\r\n".encode(), lambda got: got == b"right")

    async def run() -> tuple[int, int, int, str]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            questions = [ask(200, "right")] * 20 + [ask(200, "other")] * 3 + [ask(500, "right")] * 2
            outcome = await drive("127.0.0.1", port, each_once(questions), connections=4)
        return len(outcome.latencies_ms), outcome.wrong, outcome.errors, outcome.first_error

    right, wrong, errors, first_error = asyncio.run(run())
    assert (right, wrong, errors) == (20, 3, 2)
    assert "500" in first_error


@pytest.mark.skipif(not is_installed(), reason="h2load is not installed")
def test_h2load_against_a_server(tmp_path: Path) -> None:
    async def run() -> Load:
        async def always(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while True:
                    await reader.readuntil(b"\r\n\r\nbody")
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nright")
            except asyncio.IncompleteReadError:
                writer.close()

        async with await asyncio.start_server(always, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await asyncio.to_thread(
                run_h2load, f"http://127.0.0.1:{port}/", body, 50, clients=4, headers={"x": "y"}, is_http1=True
            )

    body = tmp_path / "body"
    body.write_bytes(b"body")
    load = asyncio.run(run())
    load.check(5)
    assert load.requests == 50
