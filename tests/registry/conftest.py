"""What the registry's tests share: a way to write async tests, an etcd, and stores of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from raymesh.registry.embedded import EmbeddedEtcd
from raymesh.registry.etcd import EtcdStore
from raymesh.registry.memory import MemoryStore

#: Nothing in these tests takes longer, unless the machine is frozen.
TEST_S = 60.0

OpenStore = Callable[[], AbstractAsyncContextManager[Any]]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run async tests, each in a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def run() -> None:
        async with asyncio.timeout(TEST_S):
            await pyfuncitem.obj(**arguments)

    asyncio.run(run())
    return True


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    """An etcd for all tests that do it no harm."""
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd"), is_durable=False) as server:
        yield server


@pytest.fixture
def own_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    """An etcd of the test's own, to kill and to freeze."""
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd"), is_durable=False) as server:
        yield server


@pytest.fixture(params=["memory", "etcd", "etcd3"])
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    """Opens a store; every kind there is."""
    make: Callable[[], Any]
    if request.param == "memory":
        make = MemoryStore
    else:
        url = request.getfixturevalue("etcd").url
        if request.param == "etcd":
            make = lambda: EtcdStore.from_url(url)  # noqa: E731
        else:
            from raymesh.registry.etcd3_store import Etcd3Store

            make = lambda: Etcd3Store.from_url(url)  # noqa: E731

    @contextlib.asynccontextmanager
    async def open_() -> AsyncGenerator[Any, None]:
        store = make()
        try:
            yield store
        finally:
            await store.close()

    return open_


@pytest.fixture
def prefix() -> str:
    """Keys that no other test uses."""
    return f"/test/{uuid.uuid4().hex}/"


@pytest.fixture
def until() -> Callable[..., Any]:
    """Waits until something is so."""

    async def wait(is_so: Callable[[], Any], what: str = "", timeout_s: float = 20.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            result = is_so()
            if inspect.isawaitable(result):
                result = await result
            if result:
                return result
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or is_so}"
            await asyncio.sleep(0.01)

    return wait
