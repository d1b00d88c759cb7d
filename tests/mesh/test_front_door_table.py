"""The front door's table against a twin of HAProxy that obeys its commands."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from raymesh.mesh.front_door_table import FrontDoorTable, split_address

SLOTS = 3


class Twin:
    """HAProxy, as far as the commands go. Refuses to route to a server that is not there."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.ready: set[str] = set()
        self.routes: dict[str, list[str]] = {}
        #: The models that the routes of vmodels lead to.
        self.models: dict[str, str] = {}

    def obey(self, commands: list[str]) -> None:
        for command in commands:
            match command.split():
                case ["route", "clear"]:
                    self.routes.clear()
                    self.models.clear()
                case ["route", "set", name, servers, *model]:
                    self.routes[name] = servers.split(",")
                    self.models[name] = model[0] if model else ""
                case ["route", "del", name]:
                    del self.routes[name], self.models[name]
                case ["set", "server", server, "addr", ip, "port", port]:
                    routed = {f"runtimes/{r}" for servers in self.routes.values() for r in servers}
                    moved = self.addresses.get(server) not in {None, f"{ip}:{port}"}
                    assert not (moved and server in routed and server in self.ready), f"{server} moved under its routes"
                    self.addresses[server] = f"{ip}:{port}"
                case ["set", "server", server, "state", "ready"]:
                    self.ready.add(server)
                case ["set", "server", server, "state", "maint"]:
                    self.ready.discard(server)
                case ["enable", "health", _]:
                    pass
                case _:
                    raise AssertionError(command)

    def live_slots(self) -> dict[int, str]:
        prefix = "runtimes/r"
        return {int(s.removeprefix(prefix)): self.addresses[s] for s in self.ready if s.startswith(prefix)}


instances = st.sampled_from(["i1", "i2", "i3", "i4", "i5"])
ports = st.integers(1, 6).map(lambda n: f"10.0.0.1:{n}")
names = st.sampled_from(["t/a", "t/b", "t/@a"])
models = st.sampled_from(["t/x", "t/y"])
holders = st.lists(instances, max_size=3)


class TableMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order, HAProxy's routes are those of the facts."""

    @initialize()
    def begin(self) -> None:
        self.twin = Twin()
        self.table = FrontDoorTable(SLOTS)
        self.instances: dict[str, str] = {}
        self.routes: dict[str, list[str]] = {}
        self.models: dict[str, str] = {}
        self.is_synced = True

    @rule(instance=instances, address=ports)
    def set_instance(self, instance: str, address: str) -> None:
        self.instances[instance] = address
        self.twin.obey(self.table.set_instance(instance, address))

    @rule(instance=instances)
    def remove_instance(self, instance: str) -> None:
        self.instances.pop(instance, None)
        self.twin.obey(self.table.remove_instance(instance))

    @rule(name=names, instances=holders, model=models, is_vmodel=st.booleans())
    def set_route(self, name: str, instances: list[str], model: str, is_vmodel: bool) -> None:
        self.routes[name] = instances
        self.models[name] = model if is_vmodel or "@" in name else ""
        self.twin.obey(self.table.set_route(name, instances, self.models[name]))

    @rule(name=names)
    def del_route(self, name: str) -> None:
        self.routes.pop(name, None)
        self.twin.obey(self.table.del_route(name))

    @rule(new=st.dictionaries(instances, ports), routes=st.dictionaries(names, holders), model=models)
    def resync(self, new: dict[str, str], routes: dict[str, list[str]], model: str) -> None:
        self.instances, self.routes = dict(new), dict(routes)
        self.models = {name: model for name in routes if "@" in name}
        self.twin.obey(self.table.resync(new, routes, self.models))
        self.is_synced = True

    @rule()
    def haproxy_restarts(self) -> None:
        self.twin = Twin()
        self.twin.obey(self.table.snapshot())
        self.is_synced = True

    @rule()
    def connection_is_lost(self) -> None:
        self.twin.obey(self.table.snapshot())
        self.is_synced = True

    @rule()
    def gateway_is_replaced(self) -> None:
        self.table = FrontDoorTable(SLOTS)
        self.table.adopt(self.twin.live_slots())
        self.instances, self.routes, self.models = {}, {}, {}
        self.is_synced = False

    @invariant()
    def holds(self) -> None:
        self.table.validate()
        if not self.is_synced:
            return
        served = {}
        for name, servers in self.twin.routes.items():
            assert all(f"runtimes/{server}" in self.twin.ready for server in servers)
            served[name] = [self.twin.addresses[f"runtimes/{server}"] for server in servers]
        direct = {i: a for i, a in self.instances.items() if i not in self.table.waiting}
        assert len(direct) == min(SLOTS, len(self.instances))
        wanted = {name: [direct[i] for i in dict.fromkeys(ids) if i in direct] for name, ids in self.routes.items()}
        assert served == {name: addresses for name, addresses in wanted.items() if addresses}
        assert self.twin.models == {name: self.models.get(name, "") for name in served}


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_same_fact_twice_is_written_once() -> None:
    table = FrontDoorTable(SLOTS)
    assert table.set_instance("i1", "10.0.0.1:1")
    assert not table.set_instance("i1", "10.0.0.1:1")
    assert table.set_route("t/a", ["i1"]) == ["route set t/a r0"]
    assert not table.set_route("t/a", ["i1", "i1", "unknown"])
    assert table.set_route("t/a", []) == ["route del t/a"]
    assert not table.del_route("t/a")


def test_an_adopted_slot_keeps_its_instance() -> None:
    table = FrontDoorTable(SLOTS)
    table.adopt({2: "10.0.0.1:7"})
    commands = table.resync({"i1": "10.0.0.1:8", "i2": "10.0.0.1:7"}, {"t/a": ["i2"]})
    assert commands[0] == "route clear"
    assert commands[-1] == "route set t/a r2"


@pytest.mark.parametrize("name", ["a", "t/", "/a", "t/a/b", "t/a b", "t/a\nroute clear", "t/a;b", "t/\xe9"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        FrontDoorTable(SLOTS).set_route(name, ["i1"])
    with pytest.raises(ValueError, match="model name"):
        FrontDoorTable(SLOTS).set_route("t/@v", ["i1"], name)


def test_a_vmodel_is_told_with_its_model() -> None:
    table = FrontDoorTable(SLOTS)
    table.set_instance("i1", "10.0.0.1:1")
    assert table.set_route("t/@v", ["i1"], "t/a") == ["route set t/@v r0 t/a"]
    # The same instances, another model: a flip.
    assert table.set_route("t/@v", ["i1"], "t/b") == ["route set t/@v r0 t/b"]
    assert not table.set_route("t/@v", ["i1"], "t/b")
    assert table.remove_instance("i1")[0] == "route del t/@v"
    with pytest.raises(ValueError, match="model name"):
        table.set_route("t/@v", ["i1"])


@pytest.mark.parametrize(
    "address", ["", "localhost:1", "1.2.3.4", "1.2.3.4:0", "1.2.3.4:x", "1.2.3.4:1;x", "1.2.3.4:70000"]
)
def test_unsafe_addresses_are_refused(address: str) -> None:
    with pytest.raises(ValueError, match="ip:port"):
        FrontDoorTable(SLOTS).set_instance("i1", address)
    with pytest.raises(ValueError, match="ip:port"):
        FrontDoorTable(SLOTS).set_gateway(address, None, None)


def test_addresses_of_both_families() -> None:
    assert split_address("10.1.2.3:80") == ("10.1.2.3", 80)
    assert split_address("[fe80::1]:80") == ("fe80::1", 80)
