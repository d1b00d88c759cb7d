"""What the front door should know, and the admin commands that make HAProxy know it.

Rule of the file: no I/O, and level-triggered. Facts may arrive in any order (a route before its instance) and any
number of times; every method returns only the commands that the change needs.
"""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Iterable, Mapping

from raymesh.registry.keys import ID_RULE, is_valid_id

#: The servers that stand for the gateway, by listener.
_GATEWAY_SERVERS = {
    "data": ("runtimes/g0", "runtimes/g1", "gateway_data/g0"),
    "grpc": ("gateway_grpc/g0",),
    "rest": ("gateway_rest/g0",),
}


class FrontDoorTable:
    """Gateway addresses, instances in server slots, and the routes of models.

    Promises: an instance is in one slot or waits for one; a slot has one instance; a slot is disabled, and no route
    names it, before it is given to another instance (the longest unused one first).
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._gateway: dict[str, str | None] = dict.fromkeys(_GATEWAY_SERVERS)
        #: Address by instance, for all known instances.
        self._addresses: dict[str, str] = {}
        #: Slot by instance. Known instances without one are in `_waiting`, in order of arrival.
        self._slot_of: dict[str, int] = {}
        self._waiting: dict[str, None] = {}
        self._free: deque[int] = deque(range(slots))
        #: Addresses of the slots an adopted HAProxy has in use, until an instance claims them or `resync` frees them.
        self._inherited: dict[int, str] = {}
        self._inherited_routes = False
        self._routes: dict[str, tuple[str, ...]] = {}
        #: The model that a vmodel's route leads to, by the route's name.
        self._models: dict[str, str] = {}
        #: The models whose route names an instance, known or not.
        self._names_of: dict[str, set[str]] = {}
        #: What HAProxy was told: servers, and the model of a vmodel's route, by name.
        self._told: dict[str, str] = {}

    @property
    def waiting(self) -> tuple[str, ...]:
        """Instances without a slot; they are reached through the gateway."""
        return tuple(self._waiting)

    @property
    def routes(self) -> int:
        """How many models HAProxy is told to route."""
        return len(self._told)

    def adopt(self, live: Mapping[int, str]) -> None:
        """Begin with a running HAProxy whose slots in use are `live` (address by slot); its routes stay until `resync`.

        To be called once, before anything else.
        """
        self._inherited = dict(live)
        self._inherited_routes = True
        self._free = deque(slot for slot in range(self._slots) if slot not in live)

    def set_gateway(self, data: str | None, grpc: str | None, rest: str | None) -> list[str]:
        """Where the gateway's listeners are (``host:port``), or None for a listener that is not there."""
        wanted = {"data": data, "grpc": grpc, "rest": rest}
        for address in wanted.values():
            if address is not None:
                split_address(address)
        self._gateway = wanted
        return self._gateway_commands()

    def set_instance(self, instance: str, address: str) -> list[str]:
        """A runtime is at `address` (``ip:port``). Raises `ValueError` on an address or id that is not one."""
        if not is_valid_id(instance):
            raise ValueError(f"instance id {instance!r}: use {ID_RULE}")
        split_address(address)
        if self._addresses.get(instance) == address:
            return []
        self._addresses[instance] = address
        if instance in self._slot_of:
            server = _slot_server(self._slot_of[instance])
            return [*_disable(server), *_enable(server, address)]
        return self._place(instance)

    def remove_instance(self, instance: str) -> list[str]:
        """A runtime is gone. Its routes go with it, its slot is disabled and free for the next."""
        if self._addresses.pop(instance, None) is None:
            return []
        self._waiting.pop(instance, None)
        slot = self._slot_of.pop(instance, None)
        if slot is None:
            return []
        commands = self._tell_routes(sorted(self._names_of.get(instance, ())))
        commands += self._release(slot)
        return commands

    def set_route(self, name: str, instances: Iterable[str], model: str = "") -> list[str]:
        """Model `name` (``tenant/id``) is held by `instances`; or, `model` given, a vmodel leads there to that model.

        A vmodel's `name` is ``tenant/@id``, or ``tenant/id`` for requests that do not say what they name. Raises
        `ValueError` on a name that is not one.
        """
        _check_name(name.replace("/@", "/", 1) if model else name)
        if model:
            _check_name(model)
        self._forget(name)
        if model:
            self._models[name] = model
        holders = tuple(dict.fromkeys(instances))
        if holders:
            self._routes[name] = holders
            for instance in holders:
                self._names_of.setdefault(instance, set()).add(name)
        return self._tell_routes([name])

    def del_route(self, name: str) -> list[str]:
        """No runtime holds model `name`."""
        self._forget(name)
        return self._tell_routes([name])

    def resync(
        self,
        instances: Mapping[str, str],
        routes: Mapping[str, Iterable[str]],
        models: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Replace everything: addresses by instance, instances by model or vmodel, models by vmodel.

        Instances whose id or address is not one are left out: a single odd record must not cost all the others.
        """
        instances = {instance: at for instance, at in instances.items() if _is_usable(instance, at)}
        commands: list[str] = []
        if self._inherited_routes:
            commands.append("route clear")
            self._told.clear()
            self._inherited_routes = False
        for name in [name for name in self._routes if name not in routes]:
            commands += self.del_route(name)
        for instance in [i for i in self._addresses if i not in instances]:
            commands += self.remove_instance(instance)
        for instance, address in instances.items():
            commands += self.set_instance(instance, address)
        for slot in self._drop_inherited():
            commands += self._release(slot)
        for name, holders in routes.items():
            commands += self.set_route(name, holders, (models or {}).get(name, ""))
        return commands

    def snapshot(self) -> list[str]:
        """Everything from scratch, for a HAProxy that just started or whose state is not known."""
        self._free.extend(self._drop_inherited())
        while self._waiting and self._free:
            self._place(next(iter(self._waiting)))
        self._inherited_routes = False
        self._told.clear()
        commands = ["route clear"]
        for slot in self._free:
            commands += _disable(_slot_server(slot))
        commands += self._gateway_commands()
        for instance, slot in self._slot_of.items():
            commands += _enable(_slot_server(slot), self._addresses[instance])
        return commands + self._tell_routes(self._routes)

    def validate(self) -> None:
        """Raise `AssertionError` if the promises of this class do not hold."""
        used = [*self._slot_of.values(), *self._inherited]
        assert sorted([*used, *self._free]) == list(range(self._slots)), "every slot is used once or free once"
        assert set(self._addresses) == set(self._slot_of) | set(self._waiting), "an instance has a slot or waits"
        assert not set(self._slot_of) & set(self._waiting), "never both"
        assert not (self._waiting and self._free), "nobody waits while a slot is free"
        for name, servers in self._told.items():
            assert servers == self._target(name), f"{name}: HAProxy was told {servers}"

    def _place(self, instance: str) -> list[str]:
        address = self._addresses[instance]
        slot = next((slot for slot, inherited in self._inherited.items() if inherited == address), None)
        if slot is not None:
            del self._inherited[slot]
        elif self._free:
            slot = self._free.popleft()
        else:
            self._waiting[instance] = None
            return []
        self._waiting.pop(instance, None)
        self._slot_of[instance] = slot
        return [*_enable(_slot_server(slot), address), *self._tell_routes(sorted(self._names_of.get(instance, ())))]

    def _release(self, slot: int) -> list[str]:
        commands = _disable(_slot_server(slot))
        self._free.append(slot)
        if self._waiting:
            commands += self._place(next(iter(self._waiting)))
        return commands

    def _drop_inherited(self) -> list[int]:
        slots = sorted(self._inherited)
        self._inherited.clear()
        return slots

    def _forget(self, name: str) -> None:
        self._models.pop(name, None)
        for instance in self._routes.pop(name, ()):
            names = self._names_of[instance]
            names.discard(name)
            if not names:
                del self._names_of[instance]

    def _target(self, name: str) -> str:
        """What follows the name in the command that sets its route; "" when it has none."""
        servers = ",".join(f"r{self._slot_of[i]}" for i in self._routes.get(name, ()) if i in self._slot_of)
        model = self._models.get(name)
        return f"{servers} {model}" if servers and model else servers

    def _tell_routes(self, names: Iterable[str]) -> list[str]:
        commands = []
        for name in names:
            target = self._target(name)
            if target == self._told.get(name, ""):
                continue
            if target:
                self._told[name] = target
                commands.append(f"route set {name} {target}")
            else:
                del self._told[name]
                commands.append(f"route del {name}")
        return commands

    def _gateway_commands(self) -> list[str]:
        commands: list[str] = []
        for listener, address in self._gateway.items():
            for server in _GATEWAY_SERVERS[listener]:
                # A new address is taken over without disabling the server: no request falls in between.
                commands += _disable(server) if address is None else _enable(server, address)
        return commands


def _is_usable(instance: str, address: str) -> bool:
    try:
        split_address(address)
    except ValueError:
        return False
    return is_valid_id(instance)


def _check_name(name: str) -> None:
    tenant, slash, model = name.partition("/")
    if not slash or not is_valid_id(tenant) or not is_valid_id(model):
        raise ValueError(f"model name {name!r}: use tenant/id, each {ID_RULE}")


def split_address(address: str) -> tuple[str, int]:
    """``ip:port`` (``[ip]:port`` for IPv6) in parts. Raises `ValueError` on anything else, host names included."""
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
        if not 0 < number < 65_536:
            raise ValueError(port)
    except ValueError:
        raise ValueError(f"address {address!r}: use ip:port") from None
    return str(ip), number


def _slot_server(slot: int) -> str:
    return f"runtimes/r{slot}"


def _enable(server: str, address: str) -> list[str]:
    ip, port = split_address(address)
    return [
        f"set server {server} addr {ip} port {port}",
        f"set server {server} state ready",
        f"enable health {server}",
    ]


def _disable(server: str) -> list[str]:
    return [f"set server {server} state maint"]
