"""The runtime's port: a real server and batcher, with a model that is arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymesh.runtimes import grpc_http1, oip
from raymesh.runtimes.batching import Batcher, Copy
from raymesh.runtimes.errors import InvalidInput, RequestError
from raymesh.runtimes.frameworks.base import TensorSpec
from raymesh.runtimes.frameworks.inputs import check_input
from raymesh.runtimes.http1 import HttpServer
from raymesh.runtimes.server import DataServer
from raymesh.runtimes.statistics import merge
from raymesh.runtimes.upstream import RawAnswer, Upstreams

TOKEN = "t"
ROW = {"name": "rows", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}


class Doubling:
    """Twice its input; fails for negative numbers, and as its own fault for 13.5."""

    platform = "arithmetic"
    is_batchable = True

    def __init__(self, datatype: str = "FP32") -> None:
        self.inputs = (TensorSpec("rows", datatype, (-1, 2)),)
        self.outputs = (TensorSpec("doubled", datatype, (-1, 2)),)
        self.calls: list[int] = []

    def predict(self, inputs: Any, outputs: Sequence[str]) -> dict[str, Any]:
        rows = check_input(self.inputs[0], inputs)
        self.calls.append(len(rows))
        if (rows == 13.5).any():
            raise ZeroDivisionError("a secret")
        if (rows < 0).any():
            raise InvalidInput("input 'rows' is negative")
        return {"doubled": rows * 2}


class Harness:
    """`async with Harness() as here`: one runtime port with the model ``default/m``."""

    def __init__(self, model: Doubling | None = None, bytes_max: int = 1 << 20) -> None:
        self.model = model or Doubling()
        self.bytes_max = bytes_max

    async def __aenter__(self) -> Harness:
        self.copy = Copy("default/m", 1, self.model, pin=lambda _: None, unpin=lambda _: None)
        loader = SimpleNamespace(
            copies={b"default/m": self.copy}, session=SimpleNamespace(is_fenced=False), size_bytes=lambda _: 1234
        )
        self.upstreams = Upstreams(TOKEN)
        self.workers = ThreadPoolExecutor(1)
        self.handler = DataServer(
            loader,
            Batcher(self.workers, lambda _: None),
            self.upstreams,
            token=TOKEN,
            message_bytes_max=self.bytes_max,
            gateway=str,
            status=dict,
        )
        self.server = HttpServer(self.handler.handle, body_bytes_max=self.bytes_max + 1000)
        await self.server.start("127.0.0.1")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.upstreams.close()
        await self.server.close()
        await self.handler.close()
        self.workers.shutdown()

    async def send(self, method: bytes, target: bytes, body: bytes = b"", **headers: str) -> RawAnswer:
        text = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()).encode()
        address = f"127.0.0.1:{self.server.port}"
        return await self.upstreams.send(address, method, target, headers=text, body=body)

    async def post(self, path: str, value: Any, **headers: str) -> tuple[int, Any]:
        body = value if isinstance(value, bytes) else orjson.dumps(value)
        answer = await self.send(b"POST", path.encode(), body, x_raymesh_model="default/m", **headers)
        if answer.header(b"content-encoding") == b"gzip":
            return answer.status, orjson.loads(gzip.decompress(answer.rest))
        return answer.status, orjson.loads(answer.rest)

    async def infer(self, *rows: list[float], **headers: str) -> tuple[int, Any]:
        tensor = {**ROW, "shape": [len(rows), 2], "data": rows}
        return await self.post("/v2/models/m/infer", {"inputs": [tensor]}, **headers)

    async def statistics(self, name: str = "default/m") -> Any:
        return orjson.loads((await self.send(b"GET", f"/control/statistics/{name}".encode())).rest)


def test_every_path_of_an_inference():
    async def body():
        async with Harness() as here:
            request = {"inputs": [ROW]}
            for path in ("/v2/models/m/infer", "/v2/models/m/versions/1/infer?x=1"):
                status, answer = await here.post(path, request)
                assert (status, answer["outputs"][0]["data"], answer["model_version"]) == (200, [2, 4], "1")
            for path in ("/v2/models/m/versions/2/infer", "/v2/models/m/versions/infer", "/v2/models/m/x/y/infer"):
                status, answer = await here.post(path, request)
                assert status == 404 and answer["error"]
            assert (await here.post("/v2/models/m/versions/%32/infer", request))[0] == 404
            assert await here.post("/v1/models/m:predict", {"instances": [[1, 2]]}) == (200, {"predictions": [[2, 4]]})
            assert (await here.post("/v1/x/models/m:predict", {"instances": [[1, 2]]}))[0] == 404

    asyncio.run(body())


def test_encodings_both_ways():
    async def body():
        async with Harness() as here:
            rows = [[float(i), 1] for i in range(10_000)]
            tensor = {**ROW, "shape": [len(rows), 2], "data": rows}
            packed = gzip.compress(orjson.dumps({"inputs": [tensor]}))
            encodings = {"content_encoding": "gzip", "accept_encoding": "gzip"}
            status, answer = await here.post("/v2/models/m/infer", packed, **encodings)
            assert (status, answer["outputs"][0]["data"][-2]) == (200, 19_998)
            packed = gzip.compress(orjson.dumps({"instances": rows}))
            status, answer = await here.post("/v1/models/m:predict", packed, **encodings)
            assert (status, len(answer["predictions"])) == (200, 10_000)
            # Small answers are not worth it.
            small = await here.send(
                b"POST",
                b"/v1/models/m:predict",
                b'{"instances": [[1, 2]]}',
                x_raymesh_model="default/m",
                accept_encoding="gzip",
            )
            assert small.header(b"content-encoding") is None
            status, answer = await here.post("/v2/models/m/infer", gzip.compress(bytes(2 << 20)), **encodings)
            assert (status, "message_bytes_max" in answer["error"]) == (413, True)

    asyncio.run(body())


def grpc_request(**fields: Any) -> bytes:
    message = oip.MESSAGES.ModelInferRequest(model_name="m", **fields)
    message.inputs.add(name="rows", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    return grpc_http1.frame(message.SerializeToString())


def test_grpc_and_its_versions():
    async def body():
        async with Harness() as here:

            async def infer(**fields: Any) -> Any:
                answer = await here.send(
                    b"POST",
                    grpc_http1.INFER_TARGET,
                    grpc_request(**fields),
                    x_raymesh_model="default/m",
                    content_type="application/grpc",
                )
                return oip.MESSAGES.ModelInferResponse.FromString(grpc_http1.read_answer(answer.head, answer.rest))

            response = await infer(id="7", model_version="1")
            assert (response.id, np.frombuffer(response.raw_output_contents[0], "<f4").tolist()) == ("7", [2, 4])
            with pytest.raises(RequestError, match="'m' version 2 is not found") as caught:
                await infer(model_version="2")
            assert caught.value.code == 5

    asyncio.run(body())


def test_statistics_count_what_happened():
    async def body():
        async with Harness() as here:
            assert (await here.infer([1, 2], [3, 4]))[0] == 200
            answers = await asyncio.gather(*(here.infer([float(n), 0]) for n in range(8)))
            assert {status for status, _ in answers} == {200}
            assert (await here.infer([-1, 0]))[0] == 400
            status, answer = await here.infer([13.5, 0])
            assert (status, answer["error"]) == (500, "model 'm' raised ZeroDivisionError")
            assert (await here.post("/v2/models/m/infer", {}))[0] == 400
            (found,) = (await here.statistics()).items()
            assert found[0] == "default/m"
            counted, stats = found[1], found[1]["inference_stats"]
            assert (counted["inference_count"], counted["execution_count"]) == (10, len(here.model.calls))
            assert counted["last_inference"] > 1_600_000_000_000 and counted["bytes"] == 1234
            assert (stats["success"]["count"], stats["fail"]["count"]) == (9, 3)
            parts = ("queue", "compute_input", "compute_infer", "compute_output")
            assert {stats[part]["count"] for part in parts} == {9}
            assert stats["success"]["ns"] == sum(stats[part]["ns"] for part in parts) > 0
            assert await here.statistics("default/") == await here.statistics()
            assert await here.statistics("other/") == await here.statistics("default/x") == {}
            twice = merge(counted, counted)
            assert twice["inference_stats"]["fail"]["count"] == 6
            assert twice["last_inference"] == counted["last_inference"]

    asyncio.run(body())


def test_a_batch_with_one_bad_request_counts_the_others():
    async def body():
        async with Harness() as here:
            answers = await asyncio.gather(*(here.infer([float(n) - 3, 0]) for n in range(8)))
            assert sorted(status for status, _ in answers) == [200] * 5 + [400] * 3
            stats = (await here.statistics())["default/m"]["inference_stats"]
            assert (stats["success"]["count"], stats["fail"]["count"]) == (5, 3)
            assert stats["compute_infer"]["count"] == stats["queue"]["count"] == 5

    asyncio.run(body())


@pytest.mark.parametrize("is_batchable", [True, False])
def test_metadata_says_how_many_rows(is_batchable):
    async def body():
        model = Doubling()
        model.is_batchable = is_batchable
        async with Harness(model) as here:
            metadata = orjson.loads((await here.send(b"GET", b"/control/metadata/default/m")).rest)
            assert (metadata["max_batch_size"] > 0) == is_batchable

    asyncio.run(body())


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "UINT64", "INT8", "FP64"])
def test_datatypes_in_json(datatype):
    async def body():
        async with Harness(Doubling("FP32" if datatype == "BF16" else datatype)) as here:
            tensor = {"name": "rows", "datatype": datatype, "shape": [1, 2], "data": [[1, 63]]}
            status, answer = await here.post("/v2/models/m/infer", {"inputs": [tensor]})
            assert (status, answer["outputs"][0]["data"]) == (200, [2, 126])
            none = {"name": "rows", "datatype": datatype, "shape": [0, 2], "data": []}
            status, answer = await here.post("/v2/models/m/infer", {"inputs": [none]})
            assert (status, answer["outputs"][0]["shape"], answer["outputs"][0]["data"]) == (200, [0, 2], [])

    asyncio.run(body())


_TARGETS = st.sampled_from(["/v2/models/m/infer", "/v2/models/m/versions/1/infer", "/v1/models/m:predict"])
_SEEDS = [
    orjson.dumps({"inputs": [ROW], "outputs": [{"name": "doubled", "parameters": {"binary_data": True}}]}),
    orjson.dumps({"instances": [[1, 2]]}),
    orjson.dumps({"id": "1", "source": "s", "specversion": "1.0", "type": "t", "data": {"instances": [[1, 2]]}}),
    grpc_request(),
]


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A good body with a few bytes replaced, cut or added."""
    body = bytearray(draw(st.sampled_from(_SEEDS)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body)))
        body[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=6))
    return bytes(body)


_HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content_type": st.sampled_from(["application/json", "application/cloudevents+json", "application/grpc"]),
        "content_encoding": st.sampled_from(["gzip", "deflate", "br", ""]),
        "inference_header_content_length": st.sampled_from(["0", "40", "-1", "99999999999999999999", "x"]),
        "accept_encoding": st.sampled_from(["gzip", "*;q=0"]),
        "ce_specversion": st.sampled_from(["1.0", "2"]),
    },
)


def test_whatever_comes_is_answered():
    """The fuzz target of the data server: any body and headers, and it answers sensibly and lives."""

    async def body():
        async with Harness() as here:
            loop = asyncio.get_running_loop()

            @settings(max_examples=200, deadline=None)
            @given(spoilt(), st.booleans(), _TARGETS, _HEADERS)
            def attack(content: bytes, is_grpc: bool, target: str, headers: dict[str, str]) -> None:
                path = grpc_http1.INFER_TARGET if is_grpc else target.encode()
                sent = here.send(b"POST", path, content, x_raymesh_model="default/m", **headers)
                answer = asyncio.run_coroutine_threadsafe(sent, loop).result(10)
                if is_grpc:
                    with contextlib.suppress(RequestError):
                        grpc_http1.read_answer(answer.head, answer.rest)
                    assert answer.status == 200
                else:
                    assert answer.status in {200, 400, 404, 413, 415}
                    assert answer.status == 200 or orjson.loads(answer.rest)["error"]

            await asyncio.to_thread(attack)
            assert (await here.infer([1, 2]))[0] == 200

    asyncio.run(body())
