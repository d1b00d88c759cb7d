"""The codec of the records: nothing is lost, and garbage is an error of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymesh.registry.keys import Keys, is_valid_id
from raymesh.registry.records import (
    CopyRecord,
    CopyState,
    GatewayRecord,
    InstanceRecord,
    LeaderRecord,
    LoadFailure,
    ModelRecord,
    RecordError,
    VModelRecord,
)

KINDS = [ModelRecord, VModelRecord, InstanceRecord, CopyRecord, GatewayRecord, LeaderRecord]

numbers = st.integers(0, 2**53)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=5,
)


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values for a field of a record."""
    if annotation is CopyState:
        return st.sampled_from(CopyState)
    if typing.get_origin(annotation) is tuple:
        return st.lists(values_of(typing.get_args(annotation)[0]), max_size=3).map(tuple)
    if annotation is LoadFailure:
        return st.builds(LoadFailure, texts, texts, numbers, numbers)
    floats = st.floats(0, 1, allow_nan=False)
    return {str: texts, int: numbers, float: floats, bool: st.booleans()}[annotation]


def records_of(kind: type) -> st.SearchStrategy[Any]:
    """Records of one kind, with fields unknown to this version."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: values_of(hints[f.name]) for f in dataclasses.fields(kind) if f.name != "extra"}
    unknown = st.dictionaries(texts.filter(lambda name: name not in fields and name not in ("v", "extra")), json_values)
    return st.builds(kind, **fields, extra=unknown.map(types.MappingProxyType))


records = st.one_of(*(records_of(kind) for kind in KINDS))


@given(record=records)
def test_a_record_survives_the_store_with_what_it_does_not_know(record):
    again = type(record).decode(record.encode())
    assert again == record
    assert dict(again.extra) == dict(record.extra)
    assert again.encode() == record.encode()


@given(record=records, unknown=json_values)
def test_fields_of_a_newer_version_are_kept(record, unknown):
    raw = {**orjson.loads(record.encode()), "v": 99, "field_of_tomorrow": unknown}
    again = type(record).decode(orjson.dumps(raw))
    assert again == record
    written = orjson.loads(dataclasses.replace(again).encode())
    assert written["field_of_tomorrow"] == unknown


@given(value=st.binary(max_size=60) | json_values.map(orjson.dumps), kind=st.sampled_from(KINDS))
def test_garbage_is_a_record_error_and_nothing_else(value, kind):
    with contextlib.suppress(RecordError):
        kind.decode(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"null", b'"text"', b"{}", b'{"v":1}', b'{"state":"flying"}'])
def test_what_is_no_record_is_refused(kind, value):
    with pytest.raises(RecordError):
        kind.decode(value)


@pytest.mark.parametrize("failures", [b'"text"', b"[1]", b'[{"instance":"i"}]', b'{"a":1}', b"7", b"null"])
def test_odd_failures_of_a_model_are_refused(failures):
    with pytest.raises(RecordError):
        ModelRecord.decode(b'{"tenant":"t","id":"m","type":"x","path":"p","failures":%s}' % failures)


def test_a_failure_with_fields_of_a_newer_version_is_read():
    failure = b'{"instance":"i","message":"why","at_ms":1,"expires_ms":2,"new":3}'
    record = ModelRecord.decode(b'{"tenant":"t","id":"m","type":"x","path":"p","failures":[%s]}' % failure)
    assert record.failures == (LoadFailure("i", "why", 1, 2),)


@pytest.mark.parametrize(
    "field",
    [
        b'"id":5',
        b'"address":null',
        b'"capacity_bytes":"1"',
        b'"busy":[]',
        b'"draining":1',
        b'"types":"cpu"',
        b'"labels":[1]',
    ],
)
def test_a_field_of_another_type_is_refused(field):
    good = orjson.loads(InstanceRecord(id="i", address="h:1", pool="cpu", epoch=1).encode())
    assert InstanceRecord.decode(orjson.dumps(good | {"busy": 0})).busy == 0
    with pytest.raises(RecordError):
        InstanceRecord.decode(orjson.dumps(good | orjson.loads(b"{%s}" % field)))


def test_missing_optional_fields_get_their_defaults():
    record = ModelRecord.decode(b'{"tenant":"t","id":"m","type":"x","path":"p"}')
    assert record == ModelRecord(tenant="t", id="m", type="x", path="p")
    assert record.name == "t/m"


def test_keys_read_back_what_they_were_made_of():
    keys = Keys("mesh-1")
    assert keys.prefix == "/raymesh/mesh-1/"
    assert keys.read_copy(keys.copy("t", "m", "i")) == ("t", "m", "i")
    assert keys.read_copy(keys.copy("t", "m", "i")).name == "t/m"
    for odd in ("t/m", "t/m/i/more", ""):
        with pytest.raises(ValueError):
            keys.read_copy(keys.copies + odd)


@pytest.mark.parametrize("text", ["", ".hidden", "-x", "a/b", "a b", "ä", "x" * 129, "a\n", "a\0"])
def test_ids_that_could_break_a_key_are_refused(text):
    assert not is_valid_id(text)
    with pytest.raises(ValueError):
        Keys(text)


@pytest.mark.parametrize("text", ["a", "0", "A.b_c-d", "x" * 128])
def test_plain_ids_are_fine(text):
    assert is_valid_id(text)
