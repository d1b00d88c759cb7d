"""The gateway's and the controller's pure parts: routes, statuses, fresh copies, orphans, notes, names."""

from __future__ import annotations

from typing import Any

import pytest

from raymesh.mesh.fresh_copies import KEEP_S, FreshCopies, Placed
from raymesh.mesh.inference_target import asked_for
from raymesh.mesh.model_notes import FAILURES_MAX, with_failure, with_load
from raymesh.mesh.model_status import Status, is_ready, status_of
from raymesh.mesh.orphans import orphans, suspects
from raymesh.mesh.route_table import Route, all_routes, route_at, route_of
from raymesh.mesh.routes_follow import RoutesFollower
from raymesh.mesh.vmodels import Named, VModelNotFound
from raymesh.registry.keys import Keys
from raymesh.registry.records import CopyRecord, CopyState, InstanceRecord, LoadFailure, ModelRecord, VModelRecord
from raymesh.registry.store import Event, KeyValue
from raymesh.registry.view import MeshView
from raymesh.runtimes.errors import InvalidInput, ModelNotFound, RequestError

KEYS = Keys()


class World:
    """A view, fed by hand. Every change is one revision."""

    def __init__(self) -> None:
        self.view = MeshView(KEYS)
        self.revision = 0
        self.created: dict[str, int] = {}

    def put(self, key: str, record: Any) -> Any:
        self.revision += 1
        created = self.created.setdefault(key, self.revision)
        return self.view.apply([Event(False, KeyValue(key, record.encode(), created, self.revision))])

    def delete(self, key: str) -> Any:
        self.revision += 1
        self.created.pop(key, None)
        return self.view.apply([Event(True, KeyValue(key, b"", 0, self.revision))])

    def model(self, model: str, **fields: Any) -> Any:
        return self.put(
            KEYS.model("default", model), ModelRecord(tenant="default", id=model, type="t", path="p", **fields)
        )

    def vmodel(self, vmodel: str, active: str, target: str = "") -> Any:
        record = VModelRecord(tenant="default", id=vmodel, active=active, target=target or active)
        return self.put(KEYS.vmodel("default", vmodel), record)

    def instance(self, instance: str, **fields: Any) -> Any:
        record = InstanceRecord(id=instance, address=f"{instance}:1", pool="cpu", epoch=1, **fields)
        return self.put(KEYS.instance(instance), record)

    def copy(self, model: str, instance: str, state: CopyState = CopyState.LOADED, generation: int = 0) -> Any:
        generation = generation or self.view.generation(f"default/{model}")
        record = CopyRecord(state=state, generation=generation, loaded_at_ms=self.revision)
        return self.put(KEYS.copy("default", model, instance), record)


@pytest.fixture
def world() -> World:
    world = World()
    world.model("m")
    for instance in ("a", "b"):
        world.instance(instance)
    return world


def test_a_route_has_usable_copies_only(world):
    assert route_of(world.view, "default/m") == ()
    world.copy("m", "b")
    world.copy("m", "a")
    assert route_of(world.view, "default/m") == ("a", "b")
    world.copy("m", "a", CopyState.LOADING)
    assert route_of(world.view, "default/m") == ("b",)
    world.copy("m", "a", generation=99)
    assert route_of(world.view, "default/m") == ("b",)
    world.instance("b", draining=True)
    assert route_of(world.view, "default/m") == ()
    assert all_routes(world.view) == {}
    world.instance("b")
    assert all_routes(world.view) == {"default/m": Route(("b",))}
    world.delete(KEYS.instance("b"))
    assert all_routes(world.view) == {}


def test_a_vmodel_is_routed_to_its_active_model(world):
    world.model("n")
    world.copy("m", "a")
    world.copy("n", "b")
    world.vmodel("v", "m", "n")
    to_m = Route(("a",), "default/m")
    models = {"default/m": Route(("a",)), "default/n": Route(("b",))}
    assert all_routes(world.view) == {**models, "default/v": to_m, "default/@v": to_m}
    world.vmodel("v", "n")
    assert route_at(world.view, "default/@v") == route_at(world.view, "default/v") == Route(("b",), "default/n")
    # A name is a model's first, loaded or not.
    world.model("v")
    assert route_at(world.view, "default/v") == Route(())
    assert route_at(world.view, "default/@v") == Route(("b",), "default/n")
    world.vmodel("m", "n")
    assert route_at(world.view, "default/m") == Route(("a",))
    assert route_at(world.view, "default/@m") == Route(("b",), "default/n")
    # An active model that is not loaded is found by the gateway.
    world.delete(KEYS.copy("default", "n", "b"))
    assert set(all_routes(world.view)) == {"default/m"}


class NotingDoor:
    """Keeps what a front door would route."""

    def __init__(self) -> None:
        self.routes: dict[str, Route] = {}

    def set_route(self, name, instances, model=""):
        self.routes[name] = Route(tuple(instances), model)

    def del_route(self, name):
        del self.routes[name]

    def set_instance(self, instance, address):
        pass

    def remove_instance(self, instance):
        pass


def test_the_door_is_told_of_every_change_that_moves_a_vmodel(world):
    door = NotingDoor()
    follower = RoutesFollower(world.view, door)
    history = [
        lambda: world.vmodel("v", "m"),
        lambda: world.copy("m", "a"),
        lambda: world.model("n"),
        lambda: world.vmodel("v", "m", "n"),
        lambda: world.copy("n", "b"),
        lambda: world.vmodel("v", "n"),
        lambda: world.model("v"),
        lambda: world.copy("v", "a"),
        lambda: world.instance("b", draining=True),
        lambda: world.instance("b"),
        lambda: world.delete(KEYS.model("default", "v")),
        lambda: world.vmodel("w", "n"),
        lambda: world.delete(KEYS.instance("b")),
        lambda: world.instance("b"),
        lambda: world.delete(KEYS.vmodel("default", "v")),
    ]
    for step in history:
        follower.see(step())
        assert door.routes == all_routes(world.view)
    assert door.routes["default/@w"] == Route(("b",), "default/n")
    follower.add("default/n", "a")
    assert door.routes["default/@w"] == door.routes["default/w"] == Route(("a", "b"), "default/n")
    follower.drop_vmodel("default/w", ["default/n"])
    assert set(door.routes) == {"default/m"}


def status(world, **fields):
    entry = world.view.models["default/m"]
    return status_of(entry, world.view, **{"now_ms": 1000, **fields})


def test_a_status_tells_the_best_news(world):
    failures = (LoadFailure("a", "old", 1, 999), LoadFailure("a", "first", 2, 2000), LoadFailure("b", "last", 3, 2000))
    assert status(world).status is Status.NOT_LOADED
    world.model("m", failures=failures)
    failed = status(world)
    assert (failed.status, failed.errors) == (Status.LOADING_FAILED, ("last", "first"))
    assert not is_ready(failed)
    assert status(world, is_loading=True).status is Status.LOADING
    assert status(world, fresh=["b"]).status is Status.LOADED
    world.copy("m", "a")
    loaded = status(world, fresh=["a"])
    assert loaded.status is Status.LOADED
    # Newest first, the fresh one counted once: the copy (time 4), then the failures of times 3 and 2.
    assert [(c.instance, c.status) for c in loaded.copies] == [
        ("a", Status.LOADED),
        ("b", Status.LOADING_FAILED),
        ("a", Status.LOADING_FAILED),
    ]


def test_fresh_copies_end_with_the_views_news(world):
    fresh = FreshCopies()
    generation = world.view.generation("default/m")

    def add(instance: str = "a", now_s: float = 0.0) -> None:
        fresh.add("default/m", Placed(instance, f"{instance}:1", generation), world.view, now_s)

    add()
    assert [placed.instance for placed in fresh.of("default/m", generation, 1.0)] == ["a"]
    assert fresh.of("default/m", generation + 1, 1.0) == ()
    assert fresh.of("default/m", generation, KEEP_S + 1) == ()
    # News of an older generation says nothing about this copy.
    fresh.see(world.copy("m", "b", generation=generation - 1 or -1))
    assert len(fresh) == 1
    fresh.see(world.copy("m", "a"))
    assert len(fresh) == 0
    add()
    assert len(fresh) == 0, "the view has it already"
    world.delete(KEYS.copy("default", "m", "a"))
    add()
    fresh.see(world.delete(KEYS.instance("a")))
    assert len(fresh) == 0
    add("b", now_s=0.0)
    fresh.see(world.delete(KEYS.model("default", "m")))
    assert len(fresh) == 0


def test_fresh_copies_do_not_pile_up(world):
    fresh = FreshCopies()
    for n in range(100):
        fresh.add(f"default/m{n}", Placed("a", "a:1", 1), world.view, now_s=float(n))
    assert len(fresh) <= KEEP_S + 1


def test_orphans(world):
    assert orphans(world.view, suspects(world.copy("m", "a"))) == []
    changes = world.delete(KEYS.model("default", "m"))
    assert suspects(changes) == {"default/m"}
    assert orphans(world.view, {"default/m"}) == [("default/m", "a")]
    # Registered again: the old copy is not the new model's.
    assert orphans(world.view, suspects(world.model("m"))) == [("default/m", "a")]
    world.delete(KEYS.instance("a"))
    assert orphans(world.view, {"default/m"}) == []


def test_notes_on_failures_and_sizes():
    record = ModelRecord(tenant="default", id="m", type="t", path="p", size_bytes=1000)
    for n in range(20):
        record = with_failure(record, LoadFailure(f"i{n}", "x", at_ms=n, expires_ms=100))
    assert len(record.failures) == FAILURES_MAX
    record = with_failure(record, LoadFailure("i19", "again", at_ms=50, expires_ms=100))
    assert [f.message for f in record.failures if f.instance == "i19"] == ["again"]
    record = with_failure(record, LoadFailure("j", "x", at_ms=200, expires_ms=300))
    assert [f.instance for f in record.failures] == ["j"]
    assert with_load(record, 1100).failures == ()
    # 10 % more is no news, a byte more than that is; an unknown size never is.
    assert [with_load(record, size).size_bytes for size in (1100, 1101, 899, 0)] == [1000, 1101, 899, 1000]


class FakeRequest:
    def __init__(self, target: bytes, headers: dict[bytes, bytes], body: bytes = b"") -> None:
        self.target, self.headers, self.body = target, headers, body


@pytest.mark.parametrize(
    ("target", "headers", "expected"),
    [
        (b"/v2/models/m/infer", {}, "default/m"),
        (b"/v2/models/m/versions/1/infer?x=1", {}, "default/m"),
        (b"/v2/models/m%2E1/infer", {}, "default/m.1"),
        (b"/v1/models/m:predict", {}, "default/m"),
        (b"/v2/models/m/infer", {b"mm-model-id": b"n"}, "default/n"),
        (b"/v2/models/m/infer", {b"mm-model-id": b"n", b"x-raymesh-model": b"t/o"}, "t/o"),
        (b"/v2/models/a%2Fb/infer", {}, ModelNotFound),
        (b"/v2/models/m/infer", {b"x-raymesh-model": b"t/"}, InvalidInput),
        (b"/v2/models//infer", {}, InvalidInput),
        (b"/v2/models/m/infer", {b"x-raymesh-model": b"t/../m"}, ModelNotFound),
        (b"/v2/models/m/infer", {b"mm-model-id-bin": b"bg"}, "default/n"),
        (b"/v2/models/m/infer", {b"mm-model-id-bin": b"bg=="}, "default/n"),
        (b"/v2/models/m/infer", {b"mm-model-id": b"n", b"mm-model-id-bin": b"bg"}, "default/n"),
        (b"/v2/models/m/infer", {b"tas-model-id": b"n"}, "default/n"),
        (b"/v2/models/m/infer", {b"mm-model-id-bin": b"?"}, InvalidInput),
        (b"/v2/models/m/infer", {b"mm-model-id-bin": b"/w=="}, InvalidInput),
        (b"/v2/models/m/infer", {b"mm-model-id": b""}, InvalidInput),
        (b"/v2/models/m/infer", {b"mm-vmodel-id": b"v"}, Named("default/v", True)),
        (b"/v2/models/m/infer", {b"mm-vmodel-id-bin": b"dg"}, Named("default/v", True)),
        # As a stale route brings it back.
        (b"/", {b"x-raymesh-vmodel": b"t/v", b"x-raymesh-model": b"t/m"}, Named("t/v", True)),
        (b"/v2/models/m/infer", {b"mm-vmodel-id": b""}, InvalidInput),
        (b"/v2/models/m/infer", {b"mm-vmodel-id": b"v", b"mm-model-id": b"n"}, InvalidInput),
        (b"/v2/models/m/infer", {b"mm-vmodel-id-bin": b"dg", b"tas-model-id": b"n"}, InvalidInput),
        (b"/v2/models/m/infer", {b"mm-vmodel-id": b"a/b"}, VModelNotFound),
        (b"/v2/models", {}, RequestError),
        (b"/", {b"content-type": b"application/grpc+proto"}, RequestError),
    ],
)
def test_which_model_a_request_is_for(target, headers, expected):
    request = FakeRequest(target, headers)
    if isinstance(expected, str):
        expected = Named(expected)
    if isinstance(expected, Named):
        assert asked_for(request, bytes_max=100) == expected
    else:
        with pytest.raises(expected):
            asked_for(request, bytes_max=100)
