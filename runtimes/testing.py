"""The contract suite every framework adapter passes, ours and third parties'.

Use it from a test: describe one model of the framework as a `Case` and call `check_framework`. Each check is a function
of its own, so a failure names what is not kept.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raymesh.runtimes.errors import InvalidInput, LoadFailed, RequestError
from raymesh.runtimes.frameworks.base import Array, Framework, LoadedModel, LoadOptions
from raymesh.runtimes.frameworks.inputs import NUMPY_DTYPES
from raymesh.runtimes.memory import allocated_bytes, release_unused


@dataclass(frozen=True, slots=True)
class Case:
    """One model to try an adapter with.

    `example(n)` gives inputs of n rows by the model's own input names; `expected(inputs)` is the library's own answer
    to them, by output name. `fuzz_count` damaged files are tried, each drawn from a seeded generator.
    """

    make_model_file: Callable[[Path], Path]
    example: Callable[[int], Mapping[str, Array]]
    expected: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    options: LoadOptions = field(default_factory=LoadOptions)
    tolerance: float = 2e-6
    fuzz_count: int = 40


def check_framework(framework: Framework, case: Case, folder: Path) -> None:
    """Raises `AssertionError` naming what the adapter does not keep. `folder` is an empty folder to work in."""
    folder.mkdir(parents=True, exist_ok=True)
    path = case.make_model_file(folder)
    check_specs(framework, case, path)
    check_answers(framework, case, path)
    check_batching(framework, case, path)
    check_bad_inputs(framework, case, path)
    check_folder(framework, case, path, folder / "as-folder")
    check_damaged_files(framework, case, path, folder / "damaged")
    check_concurrent_loads(framework, case, path)
    check_close_frees(framework, case, path)


def check_specs(framework: Framework, case: Case, path: Path) -> None:
    """The metadata is what the protocol can carry, and names what the examples use."""
    model = framework.load(path, case.options)
    assert framework.type and framework.type.islower(), "type: expected a lower-case word"
    assert model.platform, "platform: expected a word for the metadata"
    assert model.outputs, "outputs: expected at least one"
    for specs in (model.inputs, model.outputs):
        assert len({spec.name for spec in specs}) == len(specs), "specs: names must be unique"
        for spec in specs:
            assert spec.datatype in NUMPY_DTYPES, f"spec '{spec.name}': unknown datatype {spec.datatype}"
            assert all(isinstance(d, int) and d >= -1 for d in spec.shape), f"spec '{spec.name}': shape {spec.shape}"
            if model.is_batchable:
                assert spec.shape[:1] == (-1,), f"spec '{spec.name}': a batchable model has a free first dimension"
    assert set(case.example(1)) == {spec.name for spec in model.inputs}, "example: other names than the input specs"
    model.close()


def check_answers(framework: Framework, case: Case, path: Path) -> None:
    """Answers are the library's own, for 1 to 33 rows and for every dtype that holds the same numbers."""
    model = framework.load(path, case.options)
    for count in (1, 2, 7, 8, 32, 33):
        inputs = case.example(count)
        wanted = case.expected(inputs)
        answers = model.predict(inputs, ())
        assert list(answers) == [spec.name for spec in model.outputs], "predict: outputs in the order of the specs"
        for spec in model.outputs:
            _assert_fits(spec.datatype, spec.shape, answers[spec.name], spec.name)
            _assert_same(answers[spec.name], wanted[spec.name], case.tolerance, f"{spec.name}, {count} rows")
        only = model.outputs[-1].name
        assert list(model.predict(inputs, (only,))) == [only], "predict: only the outputs asked for"
    inputs = case.example(3)
    if len(inputs) == 1:
        ((name, array),) = inputs.items()
        under_other_name = model.predict({"whatever": array}, ())
        _assert_same_all(under_other_name, model.predict(inputs, ()), case.tolerance, "a single input under any name")
        if array.dtype.kind == "f":
            whole = np.round(np.nan_to_num(array))
            wanted = model.predict({name: whole}, ())
            for dtype in (np.float64, np.int64, np.int32):
                _assert_same_all(model.predict({name: whole.astype(dtype)}, ()), wanted, case.tolerance, str(dtype))
    model.close()


def check_batching(framework: Framework, case: Case, path: Path) -> None:
    """Rows answered together are answered as alone."""
    model = framework.load(path, case.options)
    if model.is_batchable:
        inputs = case.example(9)
        together = model.predict(inputs, ())
        alone = [model.predict({name: a[i : i + 1] for name, a in inputs.items()}, ()) for i in range(9)]
        for name, answer in together.items():
            _assert_same(np.concatenate([one[name] for one in alone]), answer, case.tolerance, f"{name}, row by row")
    model.close()


def check_bad_inputs(framework: Framework, case: Case, path: Path) -> None:
    """What does not fit is `InvalidInput` and names the input; the model answers as before afterwards."""
    model = framework.load(path, case.options)
    inputs = dict(case.example(2))
    before = model.predict(inputs, ())
    spec = model.inputs[0]
    array = inputs[spec.name]
    bad = {"one dimension too many": array[np.newaxis]}
    if len(spec.shape) > 1 and spec.shape[-1] >= 0:
        bad["a column too few"] = array[..., :-1]
        bad["a column too many"] = np.concatenate([array, array[..., :1]], axis=-1)
    if array.dtype != object:
        bad["complex numbers"] = array.astype(np.complex64)
    for what, wrong in bad.items():
        _assert_invalid(model, {**inputs, spec.name: np.ascontiguousarray(wrong)}, spec.name, what)
    _assert_invalid(model, {}, spec.name, "no input")
    _assert_invalid(model, {**inputs, "surplus": array}, spec.name, "an input too many")
    _assert_same_all(model.predict(inputs, ()), before, case.tolerance, "after bad inputs")
    model.close()


def check_folder(framework: Framework, case: Case, path: Path, folder: Path) -> None:
    """A folder with exactly one model file is that model; with none or two it is refused."""
    if path.is_dir():
        return
    folder.mkdir()
    _assert_load_failed(framework, folder, case, "an empty folder")
    shutil.copy(path, folder / path.name)
    (folder / "README.md").write_text("not a model")
    framework.load(folder, case.options).close()
    shutil.copy(path, folder / f"second{path.suffix}")
    _assert_load_failed(framework, folder, case, "a folder with two models")


def check_damaged_files(framework: Framework, case: Case, path: Path, folder: Path) -> None:
    """Missing, empty, cut and changed files are `LoadFailed`, or models; never a crash or another error."""
    if path.is_dir():
        return
    folder.mkdir()
    whole = path.read_bytes()
    _assert_load_failed(framework, folder / f"missing{path.suffix}", case, "a missing file")
    damaged = folder / f"damaged{path.suffix}"
    for what, data in {
        "an empty file": b"",
        "one byte": whole[:1],
        "half a file": whole[: len(whole) // 2],
        "text": b"this is no model\n" * 20,
        "zeros": bytes(len(whole)),
    }.items():
        damaged.write_bytes(data)
        _assert_load_failed(framework, damaged, case, what)
    rng = random.Random(0)
    for _ in range(case.fuzz_count):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        damaged.write_bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed))))])
        try:
            model = framework.load(damaged, case.options)
        except LoadFailed as error:
            _assert_no_path(error, damaged)
            continue
        try:
            model.predict(case.example(2), ())
        except RequestError:
            pass
        except Exception as error:  # the model's own failure: allowed, as long as the process lives
            assert not isinstance(error, MemoryError), "a damaged model must not take the machine's memory"
        model.close()


def check_concurrent_loads(framework: Framework, case: Case, path: Path) -> None:
    """Loads in several threads at once are as good as one after the other."""
    inputs = case.example(4)
    wanted = framework.load(path, case.options).predict(inputs, ())
    with ThreadPoolExecutor(4) as threads:
        for answers in threads.map(lambda _: framework.load(path, case.options).predict(inputs, ()), range(40)):
            _assert_same_all(answers, wanted, case.tolerance, "loaded in a thread")


def check_close_frees(framework: Framework, case: Case, path: Path, *, copies: int = 40) -> None:
    """`close` gives the memory back at once, while the object is still held by someone."""

    def load_all() -> list[LoadedModel]:
        return [framework.load(path, case.options) for _ in range(copies)]

    for model in load_all():  # what the library keeps for itself is allocated here
        model.close()
    before = allocated_bytes()
    models = load_all()
    loaded = allocated_bytes() - before
    for model in models:
        model.close()
        model.close()  # a second close is harmless
    left = allocated_bytes() - before
    release_unused()
    assert left <= max(loaded // 4, 4096 * copies), f"close: {left} of {loaded} bytes are still allocated"


def _assert_fits(datatype: str, shape: tuple[int, ...], array: Array, name: str) -> None:
    assert array.dtype == NUMPY_DTYPES[datatype], f"output '{name}': {array.dtype}, the spec says {datatype}"
    fits = len(array.shape) == len(shape) and all(w in (-1, h) for h, w in zip(array.shape, shape, strict=True))
    assert fits, f"output '{name}': shape {array.shape}, the spec says {shape}"


def _assert_same(have: Array, want: Array, tolerance: float, what: str) -> None:
    assert have.shape == want.shape, f"{what}: shape {have.shape}, expected {want.shape}"
    if want.dtype.kind in "fc":
        scale = max(1.0, float(np.abs(want).max(initial=0.0)))
        np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance * scale, err_msg=what)
    else:
        assert have.tolist() == want.tolist(), f"{what}: other values"


def _assert_same_all(have: Mapping[str, Array], want: Mapping[str, Array], tolerance: float, what: str) -> None:
    assert list(have) == list(want), f"{what}: other outputs"
    for name, array in want.items():
        _assert_same(have[name], array, tolerance, f"{name}: {what}")


def _assert_invalid(model: LoadedModel, inputs: Mapping[str, Array], name: str, what: str) -> None:
    try:
        model.predict(inputs, ())
    except InvalidInput as error:
        assert f"'{name}'" in error.message, f"{what}: the message does not name '{name}': {error.message}"
        return
    raise AssertionError(f"{what}: expected InvalidInput")


def _assert_load_failed(framework: Framework, path: Path, case: Case, what: str) -> None:
    try:
        framework.load(path, case.options)
    except LoadFailed as error:
        _assert_no_path(error, path)
        return
    raise AssertionError(f"{what}: expected LoadFailed")


def _assert_no_path(error: LoadFailed, path: Path) -> None:
    assert str(path.parent) not in error.message, f"the message names a path of the server: {error.message}"
    assert "Traceback" not in error.message and len(error.message) < 500, f"not for users: {error.message}"
