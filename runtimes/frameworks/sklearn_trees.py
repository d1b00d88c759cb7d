"""That the decision trees in a loaded scikit-learn model stay inside their own arrays.

Why: scikit-learn's compiled code follows the node and feature numbers of a tree without looking. skops therefore
does not trust `sklearn.tree._tree.Tree`; a file with wrong numbers would crash the process at the first prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.ensemble._gb import BaseGradientBoosting
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.tree._tree import TREE_LEAF, Tree

from raymesh.runtimes.errors import LoadFailed


def check_trees(model: Any) -> None:
    """Raises `LoadFailed` when a tree anywhere in `model` points outside itself or at a feature that is not there."""
    seen: set[int] = set()
    # (object, number of features of the nearest estimator that checks its input, or None before the first)
    waiting: list[tuple[Any, int | None]] = [(model, None)]
    while waiting:
        item, features = waiting.pop()
        if id(item) in seen or isinstance(item, (str, bytes, int, float, type(None))):
            continue
        seen.add(id(item))
        if isinstance(item, Tree):
            _check_tree(item, features)
        elif isinstance(item, TreePredictor):
            _check_predictor(item, features)
        elif isinstance(item, np.ndarray):
            if item.dtype == object:
                waiting.extend((part, features) for part in item.ravel().tolist())
        elif isinstance(item, Mapping):
            waiting.extend((part, features) for part in item.values())
        elif isinstance(item, (list, tuple, set)):
            waiting.extend((part, features) for part in item)
        elif hasattr(item, "__dict__"):
            own = vars(item).get("n_features_in_", features)
            if isinstance(item, BaseGradientBoosting):
                # It hands its rows to the trees' compiled code directly; no tree sees to its own number of features.
                _check_stages(item, own)
            waiting.extend((part, own) for part in vars(item).values())


def _check_stages(model: Any, features: Any) -> None:
    for stage in np.asarray(model.estimators_, dtype=object).ravel().tolist():
        _check_tree(stage.tree_, features)


def _check_tree(tree: Any, features: Any) -> None:
    inner = np.flatnonzero(tree.children_left != TREE_LEAF)
    children = tree.children_left[inner], tree.children_right[inner]
    _demand(tree.node_count > 0 and _is_sound(inner, *children, tree.feature[inner], tree.node_count, features))


def _check_predictor(predictor: Any, features: Any) -> None:
    """A tree of HistGradientBoosting: one structured array of nodes."""
    nodes = predictor.nodes
    _demand(isinstance(nodes, np.ndarray) and nodes.ndim == 1 and len(nodes) > 0 and nodes.dtype.names is not None)
    inner = np.flatnonzero(nodes["is_leaf"] == 0)
    if nodes["is_categorical"].any():
        raise LoadFailed("histogram gradient boosting with categorical features is not trusted; convert it to ONNX")
    children = nodes["left"][inner].astype(np.int64), nodes["right"][inner].astype(np.int64)
    _demand(_is_sound(inner, *children, nodes["feature_idx"][inner], len(nodes), features))


def _is_sound(inner: Any, left: Any, right: Any, feature: Any, count: int, features: Any) -> bool:
    """Whether the nodes `inner` point at later nodes (so no walk can go round) and at features that exist."""
    if not len(inner):
        return True
    if not isinstance(features, (int, np.integer)):
        return False
    is_inside = (left > inner) & (left < count) & (right > inner) & (right < count)
    return bool(is_inside.all() and ((feature >= 0) & (feature < features)).all())


def _demand(is_met: bool) -> None:
    if not is_met:
        raise LoadFailed("the file is damaged: a decision tree in it points outside itself")
