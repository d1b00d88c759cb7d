"""XGBoost trees in treelite's predictor (GTIL), packed small and called without ceremony.

Rule of the file: everything that leans on treelite's C interface is here, checked before it is used, and replaceable.
`load` raises `GtilUnsupported` for whatever it cannot do, and the caller uses XGBoost itself.

Why not treelite's Python API: `treelite.gtil.predict` spends about 17 of its 22 µs (one row, 50 trees) on
Python around a 4 µs call, and a `treelite.Model` takes twice the memory it needs: training statistics that no
prediction reads and empty category tables, eleven arrays per tree in all. `_pack` re-creates the model over
one block of memory that holds what is read, with every array that is known to be zero pointing at one shared block
(173 → 79 KB for 50 trees of depth 4).
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import treelite

from raymesh.runtimes.frameworks.base import Array


class GtilUnsupported(Exception):
    """This model, or this version of treelite, cannot be served here; use XGBoost itself."""


#: One row of the table treelite serializes a model to: a `Py_buffer` without the parts nobody needs.
_FRAME = np.dtype([("buf", "u8"), ("format", "u8"), ("itemsize", "u8"), ("nitem", "u8")])
#: Serialization format v4 (treelite 4.x): 20 frames for the model, then 25 for each tree, in this order.
_HEADER_FRAMES = 20
_TREE_FIELDS: tuple[tuple[str, bytes], ...] = (
    ("num_nodes", b"=l"),
    ("has_categorical_split", b"=B"),
    ("node_type", b"=b"),
    ("cleft", b"=l"),
    ("cright", b"=l"),
    ("split_index", b"=l"),
    ("default_left", b"=B"),
    ("leaf_value", b"=f"),
    ("threshold", b"=f"),
    ("cmp", b"=b"),
    ("category_list_right_child", b"=B"),
    ("leaf_vector", b"=f"),
    ("leaf_vector_begin", b"=Q"),
    ("leaf_vector_end", b"=Q"),
    ("category_list", b"=L"),
    ("category_list_begin", b"=Q"),
    ("category_list_end", b"=Q"),
    ("data_count", b"=Q"),
    ("data_count_present", b"=B"),
    ("sum_hess", b"=d"),
    ("sum_hess_present", b"=B"),
    ("gain", b"=d"),
    ("gain_present", b"=B"),
    ("num_opt_field_per_tree", b"=l"),
    ("num_opt_field_per_node", b"=l"),
)
_AT = {name: position for position, (name, _) in enumerate(_TREE_FIELDS)}
_TREE_FRAMES = len(_TREE_FIELDS)
_FORMATS = tuple(code for _, code in _TREE_FIELDS)
#: Copied into the packed block, one column (a field of all trees) after the other, wide fields first for alignment.
_KEPT = ("cleft", "cright", "split_index", "leaf_value", "threshold", "node_type", "default_left", "cmp")
_KEPT_AT = [_AT[name] for name in _KEPT]
_KEPT_BYTES = np.array([4, 4, 4, 4, 4, 1, 1, 1], dtype=np.uint64)
#: All zero in a model without categories and vector leaves, or never read by a prediction.
_ZERO = [_AT[name] for name, _ in _TREE_FIELDS[_AT["category_list_right_child"] : _AT["gain_present"] + 1]]
_EMPTY = [_AT["leaf_vector"], _AT["category_list"]]
#: Eight bytes for each node of the largest tree; grown when a larger one comes, old blocks live on in their models.
_zeros: npt.NDArray[np.uint8] = np.zeros(1 << 16, dtype=np.uint8)
_zeros_lock = threading.Lock()


def _declare() -> ctypes.CDLL:
    # A library handle of our own, so that our argument types do not change what treelite's Python code sees.
    lib = ctypes.CDLL(treelite.core._LIB._name)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, list[Any]] = {
        "TreeliteLoadXGBoostModelFromJSONString": [ctypes.c_char_p, size, ctypes.c_char_p, pointer],
        "TreeliteLoadXGBoostModelFromUBJSONString": [ctypes.c_char_p, size, ctypes.c_char_p, pointer],
        "TreeliteSerializeModelToPyBuffer": [pointer, pointer, pointer],
        "TreeliteDeserializeModelFromPyBuffer": [pointer, size, pointer],
        "TreeliteFreeModel": [pointer],
        "TreeliteQueryNumFeature": [pointer, pointer],
        "TreeliteQueryNumTree": [pointer, pointer],
        "TreeliteGTILParseConfig": [ctypes.c_char_p, pointer],
        "TreeliteGTILGetOutputShape": [pointer, ctypes.c_uint64, pointer, pointer, pointer],
        "TreeliteGTILPredict": [pointer, pointer, ctypes.c_char_p, ctypes.c_uint64, pointer, pointer],
    }
    for name, argtypes in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = argtypes, ctypes.c_int
    lib.TreeliteGetLastError.restype = ctypes.c_char_p
    return lib


_lib = _declare()
#: What treelite would print or raise as a Python warning in the middle of a load comes back as an error anyway.
_silence = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(lambda _: None)
_silenced = threading.local()
_predict_rows = _lib.TreeliteGTILPredict


def _check(status: int) -> None:
    if status != 0:
        raise GtilUnsupported((_lib.TreeliteGetLastError() or b"").decode(errors="replace"))


@functools.cache
def _config(threads: int) -> int:
    """A prediction config; there is one per thread count, for the life of the process."""
    handle = ctypes.c_void_p()
    text = json.dumps({"predict_type": "default", "nthread": max(1, threads)}).encode()
    _check(_lib.TreeliteGTILParseConfig(text, ctypes.byref(handle)))
    return int(handle.value or 0)


class GtilModel:
    """One model in treelite's predictor. `predict` takes C-contiguous FP32 ``[n, feature_count]``, n ≥ 1.

    Owns a handle of the C library and the block of memory the handle points into: the handle is freed first.
    """

    __slots__ = ("_block", "_config", "_handle", "feature_count", "row_shape")

    def __init__(self, handle: int, block: object, threads: int) -> None:
        self._handle = handle
        self._block = block
        self._config = _config(threads)
        count = ctypes.c_size_t()
        _check(_lib.TreeliteQueryNumFeature(handle, ctypes.byref(count)))
        self.feature_count = count.value
        dims, dim_count = ctypes.POINTER(ctypes.c_uint64)(), ctypes.c_uint64()
        _check(_lib.TreeliteGTILGetOutputShape(handle, 1, self._config, ctypes.byref(dims), ctypes.byref(dim_count)))
        # [rows, targets, classes]; the dimensions of one are dropped, as in XGBoost's own answers.
        self.row_shape = tuple(n for n in dims[1 : dim_count.value] if n != 1)

    def predict(self, rows: Array) -> Array:
        """FP32 answers, ``(n,)`` or ``(n, k)``. Raises `GtilUnsupported` when the library reports an error."""
        count = rows.shape[0]
        out = np.empty((count, *self.row_shape), dtype=np.float32)
        if not self._handle:
            raise RuntimeError("the model is closed")
        if count == 0:
            return out
        status = _predict_rows(self._handle, rows.ctypes.data, b"float32", count, out.ctypes.data, self._config)
        if status != 0:
            _check(status)
        return out

    def close(self) -> None:
        """Free the model."""
        if self._handle:
            handle, self._handle = self._handle, 0
            _lib.TreeliteFreeModel(handle)
            self._block = None

    def __del__(self) -> None:
        self.close()


def load(data: bytes, *, is_json: bool, threads: int = 1) -> GtilModel:
    """The XGBoost model in `data` (JSON or UBJSON).

    Raises `GtilUnsupported` for models treelite does not read (gblinear, categories …) and for trees that refer to
    nodes or features they do not have: the C code would follow those out of bounds.
    """
    read = _lib.TreeliteLoadXGBoostModelFromJSONString if is_json else _lib.TreeliteLoadXGBoostModelFromUBJSONString
    handle = ctypes.c_void_p()
    if not getattr(_silenced, "is_done", False):  # treelite keeps its callbacks per thread
        _lib.TreeliteRegisterLogCallback(_silence)
        _lib.TreeliteRegisterWarningCallback(_silence)
        _silenced.is_done = True
    _check(read(data, len(data), b'{"allow_unknown_field": false}', ctypes.byref(handle)))
    full = int(handle.value or 0)
    try:
        packed, block = _pack(full)
    finally:
        _lib.TreeliteFreeModel(full)
    return GtilModel(packed, block, threads)


def _pack(full: int) -> tuple[int, object]:
    """A handle equal to `full` over a packed block, and what must stay alive with it."""
    table = _frames_of(full)
    trees = table[_HEADER_FRAMES:].reshape(-1, _TREE_FRAMES)
    _check_layout(full, trees)
    if trees["nitem"][:, _EMPTY].any():
        raise GtilUnsupported("categorical splits or vector leaves")

    lengths = trees["nitem"][:, _AT["cleft"]]
    nodes_bytes = _padded(lengths.sum() * _KEPT_BYTES.sum())
    header = table[:_HEADER_FRAMES]
    header_sizes = header["itemsize"] * header["nitem"]
    block = np.empty(int(nodes_bytes + _padded(header_sizes).sum()), dtype=np.uint8)
    base = np.uint64(block.ctypes.data)

    columns = base + _before(_KEPT_BYTES) * lengths.sum()
    targets = columns + _before(lengths)[:, None] * _KEPT_BYTES
    _copy(trees["buf"][:, _KEPT_AT], targets, lengths[:, None] * _KEPT_BYTES)
    trees["buf"][:, _KEPT_AT] = targets
    _check_trees(full, block, lengths.astype(np.int32))
    # The model keeps pointers into some header fields too (classes, tree owners, base scores).
    targets = base + nodes_bytes + _before(_padded(header_sizes))
    _copy(header["buf"], targets, header_sizes)
    header["buf"] = targets

    zeros = _zeros_for(int(lengths.max()))
    trees["buf"][:, _ZERO] = zeros.ctypes.data
    packed = ctypes.c_void_p()
    _check(_lib.TreeliteDeserializeModelFromPyBuffer(table.ctypes.data, len(table), ctypes.byref(packed)))
    return int(packed.value or 0), (block, zeros)


def _padded(sizes: Any) -> Any:
    """Sizes in bytes, up to the next multiple of eight."""
    return (sizes + np.uint64(7)) & ~np.uint64(7)


def _before(sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """For each size the sum of those before it: where it starts."""
    starts: npt.NDArray[Any] = np.cumsum(sizes) - sizes
    return starts


def _copy(sources: npt.NDArray[Any], targets: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> None:
    """Copy memory: arrays of addresses and sizes in bytes, of one shape."""
    move = ctypes.memmove
    for target, source, size in zip(
        targets.ravel().tolist(), sources.ravel().tolist(), sizes.ravel().tolist(), strict=True
    ):
        move(target, source, size)


def _frames_of(handle: int) -> npt.NDArray[Any]:
    first, count = ctypes.c_void_p(), ctypes.c_size_t()
    _check(_lib.TreeliteSerializeModelToPyBuffer(handle, ctypes.byref(first), ctypes.byref(count)))
    raw = (ctypes.c_char * (_FRAME.itemsize * count.value)).from_address(int(first.value or 0))
    if (count.value - _HEADER_FRAMES) % _TREE_FRAMES or count.value <= _HEADER_FRAMES:
        raise GtilUnsupported("no trees, or a serialization format this version does not know")
    table: npt.NDArray[Any] = np.frombuffer(memoryview(raw), dtype=_FRAME).copy()
    return table


def _check_layout(handle: int, trees: npt.NDArray[Any]) -> None:
    """That the frames are what we take them for: the count of trees, the formats and the lengths."""
    count = ctypes.c_size_t()
    _check(_lib.TreeliteQueryNumTree(handle, ctypes.byref(count)))
    formats = tuple(ctypes.string_at(pointer) for pointer in trees["format"][0].tolist())
    nitem = trees["nitem"]
    lengths = nitem[:, _KEPT_AT]
    # Every zero array has at most one element of eight bytes for each node: then the shared block covers it.
    fits = (nitem[:, _ZERO] <= lengths[:, :1]).all() and (trees["itemsize"][:, _ZERO] <= 8).all()
    if not fits or count.value != len(trees) or formats != _FORMATS or (lengths != lengths[:, :1]).any():
        raise GtilUnsupported("a serialization format this version does not know")


def _check_trees(handle: int, block: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int32]) -> None:
    """That every inner node points forward inside its tree and at an existing feature."""
    features = ctypes.c_size_t()
    _check(_lib.TreeliteQueryNumFeature(handle, ctypes.byref(features)))
    total = int(lengths.sum())
    left, right, feature = block[: 12 * total].view(np.int32).reshape(3, total)
    inner = np.flatnonzero(left != -1)
    node = (np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths))[inner]
    length = np.repeat(lengths, lengths)[inner]
    left, right, feature = left[inner], right[inner], feature[inner]
    is_sound = (left > node) & (left < length) & (right > node) & (right < length)
    is_sound &= (feature >= 0) & (feature < features.value)
    if not is_sound.all():
        raise GtilUnsupported("trees that point outside themselves")


def _zeros_for(node_count: int) -> npt.NDArray[np.uint8]:
    global _zeros
    with _zeros_lock:
        if _zeros.nbytes < 8 * node_count:
            _zeros = np.zeros(16 * node_count, dtype=np.uint8)
        return _zeros
