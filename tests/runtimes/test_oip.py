"""Infer requests and answers on the wire, against the encoders and decoders of Triton's own clients."""

from __future__ import annotations

import contextlib
import gzip
import math
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.grpc
import tritonclient.http
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import np_to_triton_dtype

from raymesh.runtimes import grpc_http1, oip
from raymesh.runtimes.errors import Code, InvalidInput, RequestError
from raymesh.runtimes.oip import GrpcEncoder, InferRequest
from raymesh.runtimes.tensors import DTYPES, Array

_SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3)
#: What Triton's HTTP client writes as JSON numbers; FP16 and BF16 it only sends as binary.
_IN_JSON = sorted(set(DTYPES) - {"FP16"})


def bytes_array(shape: tuple[int, ...], texts: list[bytes]) -> Array:
    array = np.empty(math.prod(shape), dtype=object)
    array[:] = [texts[i % len(texts)] for i in range(array.size)]
    return array.reshape(shape)


@st.composite
def arrays(draw: st.DrawFn, datatypes: list[str] | None = None) -> Array:
    datatype = draw(st.sampled_from(datatypes or [*sorted(DTYPES), "BYTES"]))
    shape = draw(_SHAPES)
    if datatype == "BYTES":
        return bytes_array(shape, [t.encode() for t in draw(st.lists(st.text(max_size=5), min_size=1, max_size=3))])
    kwargs: dict[str, Any] = {}
    if datatype.startswith("FP"):
        kwargs["elements"] = {"allow_nan": False, "allow_infinity": False}
    return draw(hnp.arrays(DTYPES[datatype], shape, **kwargs))


@st.composite
def tensors_by_name(draw: st.DrawFn, datatypes: list[str] | None = None) -> dict[str, Array]:
    names = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3, unique=True))
    return {name: draw(arrays(datatypes)) for name in names}


def assert_same(have: dict[str, Array], want: dict[str, Array]) -> None:
    assert list(have) == list(want)
    for name, array in want.items():
        assert have[name].shape == array.shape and have[name].dtype == array.dtype
        np.testing.assert_array_equal(have[name], array)


def body_of(answer: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].startswith("HTTP/1.1 200")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    if "content-length" in headers:
        assert int(headers["content-length"]) == len(body)
    return headers, body


def grpc_message(answer: bytes) -> bytes:
    headers, body = body_of(answer)
    assert headers["transfer-encoding"] == "chunked"
    size, _, rest = body.partition(b"\r\n")
    framed = rest[: int(size, 16)]
    assert rest[len(framed) :] == b"\r\n0\r\ngrpc-status: 0\r\n\r\n"
    assert framed[0] == 0 and int.from_bytes(framed[1:5], "big") == len(framed) - 5
    return framed[5:]


# -- against Triton's clients ----------------------------------------------------------------------------------------


@given(tensors_by_name(), st.text(max_size=5))
def test_requests_of_tritons_grpc_client(tensors: dict[str, Array], request_id: str) -> None:
    inputs = []
    for name, array in tensors.items():
        tensor = tritonclient.grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in ("b", "a")]
    message = tritonclient.grpc._utils._get_inference_request(
        model_name="m",
        inputs=inputs,
        model_version="",
        request_id=request_id,
        outputs=outputs,
        sequence_id=0,
        sequence_start=False,
        sequence_end=False,
        priority=0,
        timeout=None,
        parameters=None,
    ).SerializeToString()
    request = oip.decode_grpc(message)
    assert (request.model_name, request.id, request.outputs) == ("m", request_id, ("b", "a"))
    assert_same(request.inputs, tensors)


@given(tensors_by_name(), st.text(max_size=5))
def test_answers_for_tritons_grpc_client(tensors: dict[str, Array], request_id: str) -> None:
    encoder = GrpcEncoder("m", "1")
    for _ in range(2):  # the second one from what the first one left behind
        message = grpc_message(encoder.encode(tensors, request_id))
        response = tritonclient.grpc.service_pb2.ModelInferResponse.FromString(message)
        assert (response.model_name, response.model_version, response.id) == ("m", "1", request_id)
        # By another name for who asked by that, whatever was encoded before and is after.
        aliased = tritonclient.grpc.service_pb2.ModelInferResponse.FromString(
            grpc_message(encoder.encode(tensors, request_id, alias="v"))
        )
        assert aliased.model_name == "v"
        assert aliased.outputs == response.outputs
        assert aliased.raw_output_contents == response.raw_output_contents
        result = tritonclient.grpc.InferResult(response)
        for name, array in tensors.items():
            have = result.as_numpy(name)
            np.testing.assert_array_equal(have, array)
            assert have.shape == array.shape


@given(tensors_by_name([*_IN_JSON, "BYTES"]), st.data(), st.text(max_size=5))
def test_requests_of_tritons_http_client(tensors: dict[str, Array], data: st.DataObject, request_id: str) -> None:
    inputs = []
    for name, array in tensors.items():
        tensor = tritonclient.http.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array, binary_data=data.draw(st.booleans()))
        inputs.append(tensor)
    wanted = data.draw(st.dictionaries(st.sampled_from("abc"), st.booleans()))
    outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=binary) for name, binary in wanted.items()]
    body, json_size = tritonclient.http.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs or None, request_id=request_id
    )
    header = None if json_size is None else str(json_size).encode()
    request = oip.decode_rest("m", bytes(body), header)
    assert (request.id, request.outputs) == (request_id, tuple(wanted))
    # Without outputs it asks for all of them as binary.
    assert request.binary == (wanted or True)
    assert_same(request.inputs, tensors)
    for array in request.inputs.values():
        assert array.flags.aligned and array.flags.c_contiguous


@given(tensors_by_name([*_IN_JSON, "BYTES"]), st.data(), st.text(max_size=5))
def test_answers_for_tritons_http_client(tensors: dict[str, Array], data: st.DataObject, request_id: str) -> None:
    binary = data.draw(st.booleans() | st.fixed_dictionaries({name: st.booleans() for name in tensors}))
    request = InferRequest("m", request_id, {}, tuple(tensors), is_grpc=False, binary=binary)
    headers, body = body_of(oip.encode_rest("m", "1", request, tensors, b"x-raymesh-cold: 1\r\n"))
    assert headers["x-raymesh-cold"] == "1"
    size = headers.get("inference-header-content-length")
    assert (size is not None) == (binary is True or (binary is not False and any(binary.values())))
    result = tritonclient.http.InferenceServerClient.parse_response_body(
        body, header_length=None if size is None else int(size)
    )
    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == ("m", "1")
    assert response.get("id", "") == request_id
    for name, array in tensors.items():
        have = result.as_numpy(name)
        if array.dtype == object and not (binary is True or (binary is not False and binary[name])):
            have = np.array([t.encode() for t in have.ravel()], dtype=object).reshape(array.shape)
        np.testing.assert_array_equal(have, array)
        assert have.shape == array.shape


def test_fp16_and_bf16_come_in_raw() -> None:
    message = oip.MESSAGES.ModelInferRequest(raw_input_contents=[b"\x00\x3c", b"\x80\x3f"])
    message.inputs.add(name="h", datatype="FP16", shape=[1])
    message.inputs.add(name="b", datatype="BF16", shape=[1])
    inputs = oip.decode_grpc(message.SerializeToString()).inputs
    assert inputs["h"].dtype == np.float16 and inputs["b"].dtype == np.float32
    assert inputs["h"].tolist() == inputs["b"].tolist() == [1.0]


# -- gRPC: typed contents, and lies ----------------------------------------------------------------------------------


@given(tensors_by_name([*_IN_JSON, "BYTES"]))
def test_typed_contents(tensors: dict[str, Array]) -> None:
    message = oip.MESSAGES.ModelInferRequest(model_name="m")
    for name, array in tensors.items():
        datatype = np_to_triton_dtype(array.dtype)
        field = oip._CONTENT_FIELDS[datatype][0]
        tensor = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        tensor.contents.SetInParent()
        getattr(tensor.contents, field).extend(array.ravel().tolist())
    assert_same(oip.decode_grpc(message.SerializeToString()).inputs, tensors)


def test_typed_contents_keep_large_integers() -> None:
    message = oip.MESSAGES.ModelInferRequest()
    tensor = message.inputs.add(name="u", datatype="UINT64", shape=[2])
    tensor.contents.uint64_contents.extend([1, 2**64 - 1])
    assert oip.decode_grpc(message.SerializeToString()).inputs["u"].tolist() == [1, 2**64 - 1]


def _input(**fields: Any) -> Any:
    message = oip.MESSAGES.ModelInferRequest(model_name="m")
    contents = fields.pop("contents", {})
    raw = fields.pop("raw", None)
    tensor = message.inputs.add(**{"name": "a", "datatype": "INT8", "shape": [1], **fields})
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    if raw is not None:
        message.raw_input_contents.extend(raw)
    return message


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (_input(contents={"int_contents": [128]}), "input 'a': data does not fit INT8"),
        (_input(datatype="UINT8", contents={"uint_contents": [256]}), "input 'a': data does not fit UINT8"),
        (_input(contents={"int_contents": [1, 2]}), "input 'a': shape [1] needs 1 elements in int_contents, got 2"),
        (_input(contents={"fp32_contents": [1.0]}), "input 'a': shape [1] needs 1 elements in int_contents, got 0"),
        (_input(), "input 'a': shape [1] needs 1 elements"),
        (_input(datatype="FP16", contents={"fp32_contents": [1]}), "input 'a': FP16 has no typed contents"),
        (_input(datatype="nope"), "input 'a': unknown datatype 'nope'"),
        (_input(shape=[-1]), "input 'a': shape [-1]"),
        (_input(shape=[2**62, 2**62]), "input 'a': shape"),
        (_input(shape=[1] * 40), "input 'a': shape has 40 dimensions"),
        (_input(raw=[b"\0", b"\0"]), "raw_input_contents has 2 entries for 1 inputs"),
        (_input(raw=[b"\0"], contents={"int_contents": [1]}), "input 'a': contents and raw_input_contents"),
        (_input(raw=[b"\0\0"]), "input 'a': shape [1] of INT8 needs 1 bytes, got 2"),
    ],
)
def test_lies_in_grpc_requests(message: Any, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        oip.decode_grpc(message.SerializeToString())
    assert says in caught.value.message


def test_names_given_twice_and_too_many_of_them() -> None:
    message = _input(raw=[b"\0", b"\0"])
    message.inputs.add(name="a", datatype="INT8", shape=[1])
    with pytest.raises(InvalidInput, match="input 'a' is given twice"):
        oip.decode_grpc(message.SerializeToString())
    message = _input(raw=[b"\0"])
    for _ in range(2):
        message.outputs.add(name="o")
    with pytest.raises(InvalidInput, match="asked for twice"):
        oip.decode_grpc(message.SerializeToString())
    for field in ("inputs", "outputs"):
        message = oip.MESSAGES.ModelInferRequest()
        for n in range(1025):
            getattr(message, field).add(name=str(n))
        with pytest.raises(InvalidInput, match="more than 1024"):
            oip.decode_grpc(message.SerializeToString())


@given(st.binary(max_size=60))
def test_any_message_is_a_request_or_invalid(message: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        assert isinstance(oip.decode_grpc(message), InferRequest)


# -- REST: lies ------------------------------------------------------------------------------------------------------


def rest(value: Any, binary: bytes = b"", header: bytes | None = None) -> InferRequest:
    head = value if isinstance(value, bytes) else orjson.dumps(value)
    if binary and header is None:
        header = b"%d" % len(head)
    return oip.decode_rest("m", head + binary, header)


def one(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "a", "datatype": "FP32", "shape": [1], **fields}]}


def sized(size: Any, **fields: Any) -> dict[str, Any]:
    return one(parameters={"binary_data_size": size}, **fields)


@pytest.mark.parametrize(
    ("value", "binary", "says"),
    [
        (b"", b"", "not valid JSON"),
        (b"{", b"", "not valid JSON"),
        (b"\xff", b"", "not valid JSON"),
        (b'{"inputs":' + b"[" * 5000 + b"]" * 5000 + b"}", b"", "not valid JSON"),
        (b'{"inputs":[{"name":"a","datatype":"FP32","shape":[1],"data":[NaN]}]}', b"", "not valid JSON"),
        (b'{"inputs":[{"name":"a","datatype":"FP32","shape":[1],"data":[1e999]}]}', b"", "not valid JSON"),
        ([], b"", "must be a JSON object"),
        ({}, b"", "'inputs' must be an array"),
        ({"inputs": {}}, b"", "'inputs' must be an array"),
        ({"inputs": [{"name": "a"}] * 1025}, b"", "'inputs' must be an array of at most 1024"),
        ({"inputs": [1]}, b"", "every input must be an object with a 'name'"),
        ({"inputs": [{"name": 1}]}, b"", "every input must be an object with a 'name'"),
        (one(shape=None, data=[1]), b"", "input 'a': 'shape' must be an array"),
        (one(shape=[True], data=[1]), b"", "input 'a': shape [True]"),
        (one(shape=[-1], data=[1]), b"", "input 'a': shape [-1]"),
        (one(datatype=None, data=[1]), b"", "input 'a': 'datatype' must be one of"),
        (one(), b"", "input 'a': 'data' or 'parameters.binary_data_size' is required"),
        (one(parameters=[1]), b"", "input 'a': 'data' or"),
        (one(data=[[1], [2, 3]]), b"", "input 'a': data is ragged"),
        (one(data=[1, 2]), b"", "input 'a': shape [1] needs 1 elements, data has 2"),
        (sized(4, data=[1]), b"\0" * 4, "input 'a': 'data' and 'binary_data_size' are both given"),
        (sized(5), b"\0" * 4, "input 'a': binary_data_size 5 does not fit the 4 bytes left"),
        (sized(-1), b"\0" * 4, "input 'a': binary_data_size -1"),
        (sized(True), b"\0" * 4, "input 'a': binary_data_size True"),
        (sized("4"), b"\0" * 4, "input 'a': binary_data_size '4'"),
        (sized(4.0), b"\0" * 4, "input 'a': binary_data_size 4.0"),
        (sized(4), b"\0" * 5, "1 bytes of binary data belong to no input"),
        (sized(3), b"\0" * 3, "input 'a': shape [1] of FP32 needs 4 bytes, got 3"),
        (sized(0, shape=[0, 2**40]), b"", "input 'a': shape"),
        ({"inputs": one(data=[1])["inputs"] * 2}, b"", "input 'a' is given twice"),
        ({**one(data=[1]), "id": 5}, b"", "'id' must be a string"),
        ({**one(data=[1]), "outputs": {"name": "o"}}, b"", "'outputs' must be an array"),
        ({**one(data=[1]), "outputs": ["o"]}, b"", "every output must be an object"),
        ({**one(data=[1]), "outputs": [{"name": "o"}] * 2}, b"", "output 'o' is asked for twice"),
    ],
)
def test_lies_in_rest_requests(value: Any, binary: bytes, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        rest(value, binary)
    assert says in caught.value.message


@pytest.mark.parametrize("header", [b"", b"-1", b"x", b"1.0", b"9" * 5000, b"1_0", b" 5", b"\xb2", b"100000"])
def test_lies_about_the_json_length(header: bytes) -> None:
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length"):
        rest(one(data=[1]), header=header)


def test_a_json_length_too_short_or_without_binary_data() -> None:
    body = orjson.dumps(one(data=[1]))
    assert rest(body, header=b"%d" % len(body)).inputs["a"].tolist() == [1.0]
    for length in (0, len(body) - 1):
        with pytest.raises(InvalidInput, match="not valid JSON"):
            rest(body, header=b"%d" % length)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=8,
)
_INPUTS = st.fixed_dictionaries(
    {"name": st.sampled_from("ab") | _JSON, "shape": st.just([2]) | _JSON},
    optional={
        "datatype": st.sampled_from([*DTYPES, "BYTES", "BF16"]) | _JSON,
        "data": st.just([1, 2]) | st.just(["a", "b"]) | _JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 20) | _JSON}) | _JSON,
    },
)
_REQUESTS = st.fixed_dictionaries(
    {"inputs": st.lists(_INPUTS, max_size=2) | _JSON},
    optional={"id": _JSON, "outputs": _JSON | st.lists(_JSON, max_size=2), "parameters": _JSON},
)


@given(_REQUESTS | _JSON, st.binary(max_size=20), st.none() | st.integers(0, 99).map(lambda n: b"%d" % n))
def test_any_json_is_a_request_or_invalid(value: Any, binary: bytes, header: bytes | None) -> None:
    with contextlib.suppress(InvalidInput):
        assert isinstance(rest(value, binary, header), InferRequest)


def test_binary_outputs_per_output_win_over_the_whole_request() -> None:
    value = {
        **one(data=[1]),
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "x"}, {"name": "y", "parameters": {"binary_data": False}}],
    }
    assert rest(value).binary == {"x": True, "y": False}
    assert rest({**one(data=[1]), "parameters": {"binary_data_output": "false"}}).binary is False


# -- answers ---------------------------------------------------------------------------------------------------------


def answered(outputs: dict[str, Array], binary: Any = False) -> bytes:
    return oip.encode_rest("m", "1", InferRequest("m", "", {}, (), is_grpc=False, binary=binary), outputs)


def test_nan_is_null_in_json_and_infinity_must_be_asked_for_as_binary() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        outputs = {"null": np.array([1.0, math.nan], dtype=dtype)}
        _, body = body_of(answered(outputs))
        assert orjson.loads(body)["outputs"][0]["data"] == [1.0, None]
        outputs = {"fine": np.ones(1, dtype=dtype), "o": np.array([math.inf], dtype=dtype)}
        with pytest.raises(InvalidInput, match="output 'o' is infinite"):
            answered(outputs)
        headers, _ = body_of(answered(outputs, True))
        assert headers["content-type"] == "application/octet-stream"
        body_of(answered(outputs, {"fine": False, "o": True}))


def test_float32_answers_have_the_shortest_digits() -> None:
    _, body = body_of(answered({"o": np.array([0.1], dtype=np.float32)}))
    assert b'"data":[0.1]' in body


def test_non_utf8_outputs_must_be_asked_for_as_binary() -> None:
    outputs = {"o": bytes_array((1,), [b"\xff"])}
    with pytest.raises(InvalidInput, match="output 'o' is not UTF-8"):
        answered(outputs)
    _, body = body_of(answered(outputs, True))
    assert body.endswith(b"\1\0\0\0\xff")


def test_zero_size_and_scalar_outputs() -> None:
    outputs = {"none": np.zeros((0, 3), dtype=np.float32), "one": np.array(5, dtype=np.int64)}
    _, body = body_of(answered(outputs))
    assert [o["data"] for o in orjson.loads(body)["outputs"]] == [[], [5]]
    headers, body = body_of(answered({"none": outputs["none"]}, True))
    assert int(headers["inference-header-content-length"]) == len(body)
    message = oip.MESSAGES.ModelInferResponse.FromString(grpc_message(GrpcEncoder("m", "1").encode(outputs, "")))
    assert [list(o.shape) for o in message.outputs] == [[0, 3], []]
    assert list(message.raw_output_contents) == [b"", (5).to_bytes(8, "little")]


def test_an_encoder_forgets_shapes_before_they_pile_up() -> None:
    encoder = GrpcEncoder("m", "1")
    for rows in range(200):
        message = oip.MESSAGES.ModelInferResponse.FromString(
            grpc_message(encoder.encode({"o": np.zeros(rows, dtype=np.float32)}, "x" * rows))
        )
        assert list(message.outputs[0].shape) == [rows] and message.id == "x" * rows
        assert len(encoder._fixed) <= GrpcEncoder.SHAPES_MAX


def test_errors_in_both_protocols() -> None:
    error = RequestError(Code.UNAVAILABLE, "é" * 100_000, reason="NOT_LOADED", retry_after_s=0.1)
    answer = oip.error_answer(error, is_grpc=False)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 1" in head
    assert b"\r\nx-raymesh-reason: NOT_LOADED" in head
    assert orjson.loads(body)["error"] == "é" * 4096
    answer = oip.error_answer(error, is_grpc=True)
    assert b"\r\ngrpc-status: 14\r\n" in answer and b"grpc-retry-pushback-ms: 100" in answer
    assert len(answer) < 16_000


def test_rows() -> None:
    def rows(*shapes: tuple[int, ...]) -> int:
        return InferRequest("m", "", {str(i): np.zeros(s) for i, s in enumerate(shapes)}, (), is_grpc=True).rows

    assert (rows(), rows(()), rows((0, 2)), rows((3,), (5,))) == (0, 1, 0, 3)


def test_triton_compresses_whole_rest_bodies_the_way_we_undo_it() -> None:

    body = orjson.dumps(one(data=[1]))
    assert grpc_http1.decompress(gzip.compress(body), b"gzip", bytes_max=1000) == body
