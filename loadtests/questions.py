"""Catalogue models as requests on the wire, for the load generators that send bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import orjson

from catalogue import TOLERANCE, TrainedModel
from closed_loop import Question
from raymesh.registry.protos import Messages

_OIP = Messages("raymesh.runtimes", "oip")


def grpc_frame(model: TrainedModel) -> bytes:
    """A ModelInfer call for the model's first row as gRPC sends it: five bytes of frame, then the message."""
    row = model.rows[:1]
    tensor = _OIP.ModelInferRequest.InferInputTensor(name=model.input_name, datatype="FP32", shape=row.shape)
    message = _OIP.ModelInferRequest(
        model_name=model.name, inputs=[tensor], raw_input_contents=[np.ascontiguousarray(row, "<f4").tobytes()]
    ).SerializeToString()
    return b"\0" + len(message).to_bytes(4, "big") + bytes(message)


def read_grpc_frame(body: bytes) -> np.ndarray:
    """The first output, FP32, of a ModelInferResponse in its frame; raises `ValueError` on anything else."""
    if len(body) < 5 or body[0] or int.from_bytes(body[1:5], "big") != len(body) - 5:
        raise ValueError(f"not one whole gRPC frame: {body[:100]!r}")
    answer = _OIP.ModelInferResponse.FromString(body[5:])
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], "<f4")
    return np.array(answer.outputs[0].contents.fp32_contents, np.float32)


def rest_binary(model: TrainedModel, host: str) -> Question:
    """A REST inference with the binary tensor extension both ways, for one row."""
    row = np.ascontiguousarray(model.rows[:1], "<f4").tobytes()
    header = orjson.dumps(
        {
            "inputs": [
                {
                    "name": model.input_name,
                    "datatype": "FP32",
                    "shape": [1, model.rows.shape[1]],
                    "parameters": {"binary_data_size": len(row)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    )
    head = (
        f"POST /v2/models/{model.name}/infer HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/octet-stream\r\n"
        f"inference-header-content-length: {len(header)}\r\ncontent-length: {len(header) + len(row)}\r\n\r\n"
    )
    return Question(head.encode() + header + row, ends_with_answer(model))


def ray_serve(model: TrainedModel) -> Question:
    """The same row for the peer: raw float32 in, raw float32 out, the model in the header that Ray Serve reads."""
    row = np.ascontiguousarray(model.rows[:1], "<f4").tobytes()
    head = (
        f"POST / HTTP/1.1\r\nhost: localhost\r\nserve_multiplexed_model_id: {model.path.name}\r\n"
        f"content-type: application/octet-stream\r\ncontent-length: {len(row)}\r\n\r\n"
    )
    return Question(head.encode() + row, ends_with_answer(model))


def ends_with_answer(model: TrainedModel) -> Callable[[bytes], bool]:
    """Whether a body's last bytes are the model's answer to its first row, as float32."""
    (answers,) = model.expected.values()
    want = answers[:1].astype("<f4").ravel()
    slack = TOLERANCE * (1 + np.abs(want))

    def is_right(body: bytes) -> bool:
        got = np.frombuffer(body[-want.nbytes :], "<f4") if len(body) >= want.nbytes else want[:0]
        return got.size == want.size and bool((np.abs(got - want) <= slack).all())

    return is_right
