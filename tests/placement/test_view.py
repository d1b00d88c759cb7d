"""Views made from records."""

from __future__ import annotations

from raymesh.placement.view import DEFAULT_SIZE_BYTES, ClusterView, InstanceView, InstanceViews, ModelView
from raymesh.registry.records import CopyRecord, CopyState, InstanceRecord, LoadFailure, ModelRecord


def record(instance: str, **fields: object) -> InstanceRecord:
    return InstanceRecord(id=instance, address="h:1", pool="cpu", epoch=1, capacity_bytes=100, **fields)  # type: ignore[arg-type]


def test_instance_view_says_what_the_record_says() -> None:
    view = InstanceView.from_record(
        record("i1", used_bytes=30, types=("onnx",), labels=("eu",), load_slots=0, draining=True, busy=0.5), revision=7
    )
    assert (view.id, view.capacity_bytes, view.used_bytes, view.free_bytes) == ("i1", 100, 30, 70)
    assert (view.types, view.labels, view.is_draining, view.busy, view.revision) == ({"onnx"}, {"eu"}, True, 0.5, 7)
    assert view.load_slots == 1  # 0 would divide by zero in the load queue


def test_cluster_view_is_in_order_of_id() -> None:
    view = ClusterView.from_records(5, 9, [(record("i2"), 3), (record("i1"), 2)])
    assert [(i.id, i.revision) for i in view.instances] == [("i1", 2), ("i2", 3)]
    assert view.instance("i2") is view.instances[1]
    assert view.instance("i3") is None


def test_instance_views_keep_the_views_of_unchanged_records() -> None:
    views = InstanceViews()
    assert views.at(1, 1) == ClusterView(1, 1, ())
    views.put(record("b"), 1)
    views.put(record("a"), 2)
    before = views.at(1, 2)
    views.put(record("a", used_bytes=5), 3)
    after = views.at(2, 3)
    assert [i.id for i in after.instances] == ["a", "b"]
    assert after.instances[0].used_bytes == 5
    assert after.instances[1] is before.instances[1]
    views.remove("a")
    views.remove("a")
    assert [i.id for i in views.at(3, 4).instances] == ["b"]


def test_model_view_ignores_copies_of_another_generation() -> None:
    model = ModelRecord(tenant="t", id="m", type="onnx", path="p", size_bytes=12)
    view = ModelView.from_records(
        model,
        5,
        [
            ("i1", CopyRecord(state=CopyState.LOADED, generation=5)),
            ("i2", CopyRecord(state=CopyState.LOADED, generation=4)),
        ],
    )
    assert (view.name, view.size_bytes, view.generation, view.copies) == ("t/m", 12, 5, {"i1": CopyState.LOADED})


def test_a_model_never_loaded_has_the_hinted_size() -> None:
    model = ModelRecord(tenant="t", id="m", type="onnx", path="p")
    assert ModelView.from_records(model, 1).size_bytes == DEFAULT_SIZE_BYTES
    assert ModelView.from_records(model, 1, size_hint_bytes=7).size_bytes == 7


def test_failures_expire() -> None:
    failures = (LoadFailure("i1", "bad", 0, 10), LoadFailure("i2", "bad", 0, 11))
    view = ModelView(name="t/m", type="onnx", size_bytes=1, failures=failures)
    assert view.unexpired_failures(10) == failures[1:]
