"""Vmodels in tables: what each call writes or why it is refused, and each step of a transition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raymesh.placement.vmodels import (
    RETRY_MIN_MS,
    RETRY_MS,
    Flip,
    LoadTarget,
    Plan,
    Refusal,
    SetVModel,
    Wait,
    next_step,
    plan_delete,
    plan_failure,
    plan_flip,
    plan_set,
    retry_at_ms,
)
from raymesh.registry.records import LoadFailure, ModelRecord, VModelRecord


def model(id: str, **fields: Any) -> ModelRecord:
    return ModelRecord(**{"tenant": "t", "id": id, "type": "x", "path": f"file:///{id}", **fields})


def vmodel(active: str, target: str = "", **fields: Any) -> VModelRecord:
    return VModelRecord(tenant="t", id="v", active=active, target=target or active, **fields)


def wish(target: str, **fields: Any) -> SetVModel:
    return SetVModel(tenant="t", id="v", target=target, **fields)


A, B, C = model("a", refs=1), model("b"), model("c")


@pytest.mark.parametrize(
    ("asked", "present", "code"),
    [
        (wish("none"), None, "NOT_FOUND"),
        (wish("b", updates_only=True), None, "NOT_FOUND"),
        (wish("b", expected_target="a"), None, "FAILED_PRECONDITION"),
        (wish("b", expected_target="c"), vmodel("a"), "FAILED_PRECONDITION"),
        (wish("none"), vmodel("a"), "NOT_FOUND"),
        (wish("b", created=model("b", path="other")), vmodel("a"), "ALREADY_EXISTS"),
        (wish("b", owner="me"), vmodel("a", owner="you"), "ALREADY_EXISTS"),
        (wish("b", owner="me"), vmodel("a"), "ALREADY_EXISTS"),
    ],
)
def test_refusals(asked, present, code):
    refusal = plan_set(asked, present, {"a": A, "b": B, "c": C}, loaded=())
    assert isinstance(refusal, Refusal)
    assert refusal.code == code


@pytest.mark.parametrize(
    ("asked", "present", "loaded", "expected"),
    [
        # Created: nothing to wait for.
        (wish("b", owner="me"), None, "", vmodel("b", owner="me")),
        (wish("b", expected_target="b"), None, "", vmodel("b")),
        # The active model is not loaded, so nobody is worse off at once; unless the target is to be loaded first.
        (wish("b"), vmodel("a"), "", vmodel("b")),
        (wish("b", loads_now=True), vmodel("a"), "", vmodel("a", "b", loads_target=True)),
        (wish("b"), vmodel("a"), "a", vmodel("a", "b")),
        (wish("b"), vmodel("a"), "ab", vmodel("b")),
        (wish("b", is_forced=True), vmodel("a"), "a", vmodel("b")),
        (wish("b", is_forced=True), vmodel("a", "b"), "a", vmodel("b")),
        # Another target in the middle of a transition; and back.
        (wish("c"), vmodel("a", "b", failure="x", retry_at_ms=9), "a", vmodel("a", "c")),
        (wish("a"), vmodel("a", "b", failure="x", retry_at_ms=9, loads_target=True), "a", vmodel("a")),
        # The same again: what was begun goes on, what failed is tried again, whatever was expected.
        (wish("b"), vmodel("a", "b", loads_target=True), "a", vmodel("a", "b", loads_target=True)),
        (wish("b"), vmodel("a", "b", failure="x", retry_at_ms=9), "a", vmodel("a", "b")),
        (wish("b", expected_target="a"), vmodel("b"), "", vmodel("b")),
        (wish("b", owner=""), vmodel("a", owner="you"), "", vmodel("b", owner="you")),
    ],
)
def test_what_a_call_makes_of_a_vmodel(asked, present, loaded, expected):
    plan = plan_set(asked, present, {"a": A, "b": B, "c": C}, loaded)
    assert isinstance(plan, Plan)
    assert plan.vmodel == expected


def test_a_target_is_created_with_its_first_reference_and_the_age_of_what_it_replaces():
    asked = wish("n", created=model("n", auto_delete=True, last_used_ms=99))
    plan = plan_set(asked, vmodel("a"), {"a": replace(A, last_used_ms=7)}, loaded="a")
    assert isinstance(plan, Plan)
    assert dict(plan.models) == {"n": model("n", auto_delete=True, last_used_ms=7, refs=1)}
    plan = plan_set(asked, None, {}, loaded="")
    assert isinstance(plan, Plan)
    assert dict(plan.models) == {"n": model("n", auto_delete=True, last_used_ms=99, refs=1)}


def test_a_model_that_is_there_keeps_its_own_flag():
    asked = wish("b", created=model("b", auto_delete=True))
    plan = plan_set(asked, vmodel("a"), {"a": A, "b": B}, loaded="a")
    assert isinstance(plan, Plan)
    assert dict(plan.models) == {"b": replace(B, refs=1)}


def test_references_follow():
    one = replace(B, refs=1)
    flip = plan_flip(vmodel("a", "b"), "b", {"a": A, "b": one})
    assert flip == Plan(vmodel("b"), {"a": replace(A, refs=0)})
    flip = plan_flip(vmodel("a", "b"), "b", {"a": replace(A, auto_delete=True), "b": one})
    assert flip is not None
    assert flip.deleted == ("a",)
    # Somebody else refers to it, so it stays.
    flip = plan_flip(vmodel("a", "b"), "b", {"a": replace(A, auto_delete=True, refs=2), "b": one})
    assert flip is not None
    assert flip.deleted == ()
    gone = plan_delete(vmodel("a", "b"), "", {"a": A, "b": replace(one, auto_delete=True)})
    assert gone == Plan(None, {"a": replace(A, refs=0), "b": None})
    # A new target that is not waited for any more goes as well.
    plan = plan_set(wish("c"), vmodel("a", "b"), {"a": A, "b": replace(one, auto_delete=True), "c": C}, loaded="a")
    assert isinstance(plan, Plan)
    assert dict(plan.models) == {"b": None, "c": replace(C, refs=1)}


def test_late_news_changes_nothing():
    for present in (None, vmodel("a"), vmodel("b"), vmodel("a", "c")):
        assert plan_flip(present, "b", {}) is None
        assert plan_failure(present, "b", "x", 1) is None
    assert plan_delete(None, "", {}) is None
    assert plan_delete(vmodel("a", owner="you"), "me", {}) is None


@pytest.mark.parametrize(
    ("present", "loaded", "now_ms", "step"),
    [
        (vmodel("a"), "", 0, None),
        (vmodel("a", "b"), "", 0, Flip()),
        (vmodel("a", "b"), "b", 0, Flip()),
        (vmodel("a", "b"), "ab", 0, Flip()),
        (vmodel("a", "b"), "a", 0, LoadTarget()),
        (vmodel("a", "b", loads_target=True), "", 0, LoadTarget()),
        (vmodel("a", "b", failure="x", retry_at_ms=9), "a", 8, Wait(9)),
        (vmodel("a", "b", failure="x", retry_at_ms=9), "a", 9, LoadTarget()),
        # It was loaded all the same.
        (vmodel("a", "b", failure="x", retry_at_ms=9), "ab", 8, Flip()),
    ],
)
def test_steps(present, loaded, now_ms, step):
    assert next_step(present, loaded, now_ms) == step


def test_when_to_try_again():
    failures = [LoadFailure("i", "x", 0, 5_000), LoadFailure("j", "x", 0, 90_000), LoadFailure("k", "x", 0, 50_000)]
    assert retry_at_ms(failures, 10_000) == 50_000
    assert retry_at_ms(failures, 49_900) == 49_900 + RETRY_MIN_MS
    assert retry_at_ms(failures, 100_000) == 100_000 + RETRY_MS
