"""The layout of the registry's key space, in one place (ARCHITECTURE section 4)."""

from __future__ import annotations

import re
from typing import NamedTuple

#: What an id may look like. Decoded once, at the edge; `/` never occurs, so keys cannot be forged.
ID_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
ID_RULE = "1 to 128 characters of A-Z a-z 0-9 . _ - beginning with a letter or digit"

DEFAULT_TENANT = "default"


def is_valid_id(text: str) -> bool:
    """Whether `text` may name a tenant, a model, a vmodel or an instance."""
    return ID_PATTERN.fullmatch(text) is not None


class CopyKey(NamedTuple):
    """What a copy's key says: which model, where."""

    tenant: str
    model: str
    instance: str

    @property
    def name(self) -> str:
        """The model's full name, ``tenant/id``."""
        return f"{self.tenant}/{self.model}"


class Keys:
    """Builds and reads the keys of one mesh. All of them start with `prefix`, ``/raymesh/<mesh>/``."""

    def __init__(self, mesh: str = "default") -> None:
        if not is_valid_id(mesh):
            raise ValueError(f"mesh name {mesh!r}: use {ID_RULE}")
        self.prefix = f"/raymesh/{mesh}/"
        self.models = self.prefix + "models/"
        self.vmodels = self.prefix + "vmodels/"
        self.instances = self.prefix + "instances/"
        self.copies = self.prefix + "copies/"
        self.gateways = self.prefix + "gateways/"
        self.leader = self.prefix + "leader"

    def model(self, tenant: str, model: str) -> str:
        """The key of a model's record."""
        return f"{self.models}{tenant}/{model}"

    def vmodel(self, tenant: str, vmodel: str) -> str:
        """The key of a vmodel's record."""
        return f"{self.vmodels}{tenant}/{vmodel}"

    def instance(self, instance: str) -> str:
        """The key of an instance's record."""
        return self.instances + instance

    def gateway(self, gateway: str) -> str:
        """The key of a gateway's record."""
        return self.gateways + gateway

    def copy(self, tenant: str, model: str, instance: str) -> str:
        """The key of a copy's record."""
        return f"{self.copies}{tenant}/{model}/{instance}"

    def read_copy(self, key: str) -> CopyKey:
        """What a copy's key says; raises `ValueError` if it is not one."""
        tenant, model, instance = key.removeprefix(self.copies).split("/")
        return CopyKey(tenant, model, instance)
