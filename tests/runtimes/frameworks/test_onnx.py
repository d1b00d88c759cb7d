from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from raymesh.runtimes.errors import InvalidInput, LoadFailed
from raymesh.runtimes.frameworks import onnx as adapter
from raymesh.runtimes.frameworks.base import LoadOptions
from raymesh.runtimes.testing import Case, check_framework

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING


def load(path: Path) -> Any:
    return adapter.FRAMEWORK.load(path, LoadOptions())


def graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: tuple[Any, ...] = ()) -> Any:
    body = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def value(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def linear(batch: Any = "n") -> Any:
    weights = onnx.numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("ArgMax", ["y"], ["label"], axis=1)]
    outputs = [value("label", INT64, [batch, 1]), value("y", FLOAT, [batch, 2])]
    return graph(nodes, [value("x", FLOAT, [batch, 4])], outputs, (weights,))


def save(model: Any, folder: Path, name: str = "m.onnx") -> Path:
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


def test_contract(tmp_path: Path) -> None:
    def expected(inputs: Any) -> dict[str, Any]:
        session = onnxruntime.InferenceSession(linear().SerializeToString())
        return dict(zip(["label", "y"], session.run(None, dict(inputs)), strict=True))

    case = Case(
        lambda folder: save(linear(), folder),
        lambda n: {"x": np.random.default_rng(n).normal(size=(n, 4)).astype(np.float32)},
        expected,
    )
    check_framework(adapter.FRAMEWORK, case, tmp_path)


def test_several_inputs_go_by_name(tmp_path: Path) -> None:
    inputs = [value("a", FLOAT, ["n"]), value("b", FLOAT, ["n"])]
    model = load(
        save(graph([helper.make_node("Sub", ["a", "b"], ["c"])], inputs, [value("c", FLOAT, ["n"])]), tmp_path)
    )
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    assert model.predict({"b": one, "a": two}, ())["c"].tolist() == [1, 1]
    with pytest.raises(InvalidInput, match="'a', 'b'"):
        model.predict({"a": one}, ())


def test_only_free_first_dimensions_batch(tmp_path: Path) -> None:
    assert load(save(linear("n"), tmp_path)).is_batchable
    fixed = load(save(linear(1), tmp_path))
    assert not fixed.is_batchable
    assert fixed.inputs[0].shape == (1, 4)
    with pytest.raises(InvalidInput, match=r"input 'x': expected FP32 \[1,4\]"):
        fixed.predict({"x": np.zeros((2, 4), np.float32)}, ())
    # The sum over all rows is one number for the whole batch.
    nodes = [helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0)]
    assert not load(save(graph(nodes, [value("x", FLOAT, ["n", 2])], [value("s", FLOAT, [])]), tmp_path)).is_batchable


def test_text_in_and_out(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["t"], ["u"])]
    model = load(save(graph(nodes, [value("t", STRING, ["n"])], [value("u", STRING, ["n"])]), tmp_path))
    assert model.inputs[0].datatype == model.outputs[0].datatype == "BYTES"
    sent = np.array([b"a", "ö".encode()], dtype=object)
    assert model.predict({"t": sent}, ())["u"].tolist() == [b"a", "ö".encode()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labels", [np.array([0, 1, 2]), np.array(["a", "b", "c"])], ids=["numbers", "text"])
def test_a_classifier_with_maps_gives_an_array(labels: Any, tmp_path: Path) -> None:
    import skl2onnx
    from sklearn.linear_model import LogisticRegression

    rows = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    estimator = LogisticRegression().fit(rows, labels[np.digitize(rows[:, 0], [-0.5, 0.5])])
    model = load(save(skl2onnx.to_onnx(estimator, rows[:1]), tmp_path))
    assert model.is_batchable
    answers = model.predict({"X": rows[:9]}, ())
    np.testing.assert_allclose(answers["output_probability"], estimator.predict_proba(rows[:9]), atol=1e-5)
    texts = [item.decode() if isinstance(item, bytes) else item for item in answers["output_label"]]
    assert texts == estimator.predict(rows[:9]).tolist()


def test_types_the_protocol_cannot_carry_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["s"])]
    out = helper.make_tensor_sequence_value_info("s", FLOAT, None)
    with pytest.raises(LoadFailed, match=r"output 's'.*plain tensors"):
        load(save(graph(nodes, [value("x", FLOAT, ["n"])], [out]), tmp_path))


def test_weights_beside_the_model(tmp_path: Path) -> None:
    onnx.save_model(linear(), tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    answer = load(tmp_path).predict({"x": np.ones((1, 4), np.float32)}, ("y",))
    assert answer["y"].tolist() == [[12, 16]]
