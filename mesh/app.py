"""The Serve application: a gateway, a placement controller and a pool of runtimes.

Serve keeps the processes alive and nothing more. Use ``raymesh up``, or ``serve run raymesh.mesh.app:app`` with
``RAYMESH_REGISTRY=etcd://…`` (and any other ``RAYMESH_<SETTING>``) in the environment.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from raymesh.mesh.config import Settings
from raymesh.placement.cache import InstanceCache
from raymesh.registry.etcd import EtcdStore
from raymesh.registry.store import Store
from raymesh.runtimes.actor import CLOSE_TIMEOUT_S, LoopReplica, Part, RuntimeReplica
from raymesh.runtimes.memory import memory_capacity_bytes
from raymesh.runtimes.runtime import RuntimeOptions


class _Shell(Part, Protocol):
    """The gateway or the controller."""

    async def start(self) -> None: ...


async def _start(make: Callable[[Settings, Store], _Shell], settings: Settings) -> _Shell:
    shell = make(settings, EtcdStore.from_url(settings.registry))
    await shell.start()
    return shell


class ControllerReplica(LoopReplica):
    """The placement controller's deployment class."""

    def __init__(self, settings: Settings) -> None:
        from raymesh.mesh.controller import Controller

        self._begin("controller", _start(Controller, settings))


class GatewayReplica(LoopReplica):
    """The gateway's deployment class, and the application's ingress: the handles only tie the application together."""

    def __init__(self, settings: Settings, controller: DeploymentHandle[Any], runtimes: DeploymentHandle[Any]) -> None:
        from raymesh.mesh.gateway import Gateway

        self._settings = settings
        self._begin("gateway", _start(Gateway, settings))

    async def __call__(self, request: Any) -> str:
        """What Serve's own HTTP proxy answers: where the mesh really listens."""
        return f"raymesh listens on port {self._settings.port}\n"


def build(settings: Settings) -> Application:
    """The application for `settings`. Zeros in it (runtimes, memory) become this machine's share."""
    runtimes = settings.runtimes or os.cpu_count() or 1
    memory_bytes = settings.memory_bytes or memory_capacity_bytes() // 2
    settings = dataclasses.replace(
        settings.resolved(),
        runtimes=runtimes,
        memory_bytes=memory_bytes,
        internal_token=settings.internal_token or secrets.token_hex(16),
    )
    options = RuntimeOptions(
        instance="",
        mesh=settings.mesh,
        pool="cpu",
        token=settings.internal_token,
        disk_cache_dir=settings.state_dir / "models",
        disk_cache_bytes=settings.disk_cache_bytes,
        lease_ttl_s=settings.lease_ttl_s,
        load_timeout_s=settings.load_timeout_s,
        load_slots=settings.load_slots,
        message_bytes_max=settings.message_bytes_max,
        trust_pickle=settings.trust_pickle,
    )
    make_cache = functools.partial(InstanceCache, memory_bytes // runtimes)
    common: dict[str, Any] = {
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": CLOSE_TIMEOUT_S + 1.0,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    pool: Any = serve.deployment(name="cpu", num_replicas=runtimes, ray_actor_options={"num_cpus": 1}, **common)
    single: Any = serve.deployment(ray_actor_options={"num_cpus": 0}, **common)
    controller = single(ControllerReplica).options(name="controller")
    gateway = single(GatewayReplica).options(name="gateway")
    application: Application = gateway.bind(
        settings, controller.bind(settings), pool(RuntimeReplica).bind(options, settings.registry, make_cache)
    )
    return application


def __getattr__(name: str) -> Any:
    # `app` is made on demand: importing this module must not depend on the environment.
    if name == "app":
        return build(Settings.from_env())
    raise AttributeError(name)
