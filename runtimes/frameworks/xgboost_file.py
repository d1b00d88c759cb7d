"""What is in an XGBoost model file, read without XGBoost.

XGBoost trusts its files: a flipped byte in a UBJSON model, or a node that points outside its tree, ends the process
(seen with 3.2: segmentation faults and endless loops). So bytes reach XGBoost only after `check_model` has walked them.
Rule of the file: no C code sees anything here; errors are `LoadFailed` in the user's terms.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import orjson

from raymesh.runtimes.errors import LoadFailed

_NOT_XGBOOST = "the file is not an XGBoost model in JSON or UBJSON form, or it is damaged"
#: More classes or targets than this is a damaged file, not a model; XGBoost would allocate for them.
_OUTPUTS_MAX = 100_000
#: UBJSON's types of numbers, all big-endian.
_NUMBERS = {b"i": ">i1", b"U": ">u1", b"I": ">i2", b"l": ">i4", b"L": ">i8", b"d": ">f4", b"D": ">f8"}
#: Deepest nesting of a UBJSON model is about eight.
_DEPTH_MAX = 32
_PARAMETERS = b"learner_model_param"
_OUTPUT_COUNT = re.compile(rb"num_(?:class|target)(?:\":\"|SL.{8}|Si.|SU.)(-?\d+)", re.DOTALL)


def is_json(data: bytes) -> bool:
    """True for JSON, False for UBJSON; raises `LoadFailed` when it is neither."""
    head = data[:64].lstrip()
    if head[:4] == b"binf" or head[:3] == b"bs6":
        raise LoadFailed("the file is in XGBoost's old binary format; save it again with save_model('model.ubj')")
    if head[:1] != b"{" or len(data) < 16:
        raise LoadFailed(f"{_NOT_XGBOOST}; save it with Booster.save_model('model.ubj')")
    return data[1:64].lstrip()[:1] in (b'"', b"}")


def model_kind(data: bytes) -> bytes:
    """What decides how the trees' sums become answers: objective, parameters, XGBoost's version; numbers left out.

    Two files of one kind differ in trees and weights only. Raises `LoadFailed` when the file has no such part, or a
    number of classes that no model has.
    """
    start = data.rfind(_PARAMETERS)
    if start < 0:
        raise LoadFailed(_NOT_XGBOOST)
    tail = data[start:]
    if any(not 0 <= int(count) <= _OUTPUTS_MAX for count in _OUTPUT_COUNT.findall(tail)):
        raise LoadFailed(_NOT_XGBOOST)
    version = tail.rfind(b"version")
    # "[5E-1]" and "[1.5E0,2E0]" are two kinds: one base score, and one for each target.
    return re.sub(rb"[^a-zA-Z:_\[\],]+", b"#", tail[:version]) + tail[version:]


def check_model(data: bytes) -> None:
    """That XGBoost can read `data` without harm: well-formed, and every index inside its table.

    Raises `LoadFailed` otherwise. Costs a few milliseconds for 50 trees, so it is kept off the common path.
    """
    try:
        document = orjson.loads(data) if is_json(data) else _Ubjson(data).document()
        _check_booster(document["learner"]["gradient_booster"], document["learner"]["learner_model_param"])
    except (KeyError, TypeError, ValueError, IndexError, struct.error, OverflowError, UnicodeDecodeError):
        raise LoadFailed(_NOT_XGBOOST) from None


def _check_booster(booster: dict[str, Any], parameters: dict[str, Any]) -> None:
    features, classes = int(parameters["num_feature"]), int(parameters["num_class"])
    targets = int(parameters.get("num_target", 1))
    _demand(0 <= features < 2**31 and 0 <= classes <= _OUTPUTS_MAX and 0 <= targets <= _OUTPUTS_MAX)
    outputs = max(1, classes, targets)
    if booster["name"] == "gblinear":
        _demand(len(booster["model"]["weights"]) == (features + 1) * outputs)
        return
    if booster["name"] == "dart":
        inner = booster["gbtree"]
        _demand(len(booster["weight_drop"]) == len(inner["model"]["trees"]))
        booster = inner
    model = booster["model"]
    trees, owners = model["trees"], np.asarray(model["tree_info"], dtype=np.int64)
    _demand(int(model["gbtree_model_param"]["num_trees"]) == len(trees) == len(owners))
    _demand(bool(((owners >= 0) & (owners < outputs)).all()))
    if "iteration_indptr" in model:
        bounds = np.asarray(model["iteration_indptr"], dtype=np.int64)
        _demand(bounds[0] == 0 and bounds[-1] == len(trees) and bool((np.diff(bounds) >= 0).all()))
    for tree in trees:
        _check_tree(tree, features, targets)


def _check_tree(tree: dict[str, Any], features: int, targets: int) -> None:
    count = int(tree["tree_param"]["num_nodes"])
    left = np.asarray(tree["left_children"], dtype=np.int64)
    right = np.asarray(tree["right_children"], dtype=np.int64)
    parents = np.asarray(tree["parents"], dtype=np.int64)
    split = np.asarray(tree["split_indices"], dtype=np.int64)
    kinds = np.asarray(tree["split_type"], dtype=np.int64)
    _demand(count > 0 and len(left) == len(right) == len(parents) == len(split) == len(kinds) == count)
    inner = np.flatnonzero(left != -1)
    # Every node but the root is the child of exactly one: then the inner nodes form a tree, without a cycle.
    children = np.concatenate([left[inner], right[inner]])
    _demand(bool(((children > 0) & (children < count)).all()) and len(np.unique(children)) == len(children))
    _check_leaves(tree, right[left == -1], targets)
    _demand(bool((parents[children] == np.concatenate([inner, inner])).all()))
    _demand(bool(((split[inner] >= 0) & (split[inner] < features)).all()))
    _demand(bool(np.isin(kinds, (0, 1)).all()))
    categories = np.asarray(tree.get("categories", ()), dtype=np.int64)
    nodes = np.asarray(tree.get("categories_nodes", ()), dtype=np.int64)
    segments = np.asarray(tree.get("categories_segments", ()), dtype=np.int64)
    sizes = np.asarray(tree.get("categories_sizes", ()), dtype=np.int64)
    _demand(len(nodes) == len(segments) == len(sizes) == int((kinds == 1).sum()))
    _demand(bool(((nodes >= 0) & (nodes < count)).all()) and len(np.unique(nodes)) == len(nodes))
    _demand(bool(((segments >= 0) & (sizes >= 0) & (segments + sizes <= len(categories))).all()))
    # Categories index a bit set that grows to the largest of them.
    _demand(bool(((categories >= 0) & (categories < 2**24)).all()))


def _demand(is_met: bool) -> None:
    if not is_met:
        raise ValueError


def _check_leaves(tree: dict[str, Any], right: Any, targets: int) -> None:
    """A leaf has no right child; in a tree with vector leaves that field is the leaf's row in a table of weights."""
    size = int(tree["tree_param"].get("size_leaf_vector", 1))
    if size <= 1:
        _demand(bool((right == -1).all()))
        return
    _demand(size == targets and len(tree["leaf_weights"]) == size * len(right))
    _demand(bool(((right >= 0) & (right < len(right))).all()))


class _Ubjson:
    """A UBJSON reader (draft 12), as far as XGBoost writes it; anything odd raises `ValueError` or `IndexError`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def document(self) -> Any:
        value = self._value(self._take(1), 0)
        _demand(not self._data[self._at :].strip(b"N\0 \n"))
        return value

    def _take(self, count: int) -> bytes:
        end = self._at + count
        _demand(count >= 0 and end <= len(self._data))
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _number(self, kind: bytes) -> Any:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _length(self) -> int:
        length = self._number(self._take(1))
        _demand(isinstance(length, int) and 0 <= length <= len(self._data))
        return int(length)

    def _text(self) -> str:
        return self._take(self._length()).decode()

    def _value(self, kind: bytes, depth: int) -> Any:
        _demand(depth < _DEPTH_MAX)
        if kind == b"{":
            return self._object(depth)
        if kind == b"[":
            return self._array(depth)
        if kind == b"S":
            return self._text()
        if kind in b"TFZ":
            return {b"T": True, b"F": False, b"Z": None}[kind]
        return self._number(kind)

    def _object(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while self._data[self._at : self._at + 1] != b"}":
            name = self._text()
            # Readers disagree about which of two equal names counts.
            _demand(name not in found)
            found[name] = self._value(self._take(1), depth + 1)
        self._at += 1
        return found

    def _array(self, depth: int) -> Any:
        head = self._data[self._at : self._at + 1]
        if head == b"$":
            self._at += 1
            dtype = np.dtype(_NUMBERS[self._take(1)])
            _demand(self._take(1) == b"#")
            count = self._length()
            return np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if head == b"#":
            self._at += 1
            return [self._value(self._take(1), depth + 1) for _ in range(self._length())]
        items = []
        while self._data[self._at : self._at + 1] != b"]":
            items.append(self._value(self._take(1), depth + 1))
        self._at += 1
        return items
