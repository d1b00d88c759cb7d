"""One mesh for the whole suite: real Ray, real HAProxy, and an etcd that the tests own and may kill."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from catalogue import Order, Recipe, TrainedModel, train_one
from launching import Mesh
from raymesh.mesh.client import Client
from raymesh.registry.embedded import EmbeddedEtcd

#: Room for some 180 of the models used here, so that a test can make the mesh evict without loading thousands.
MEMORY_BYTES = 12 * 1024**2
RUNTIMES = 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.e2e)
            # The first test pays for the start of the mesh.
            item.add_marker(pytest.mark.timeout(240))


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedEtcd]:
    etcd = EmbeddedEtcd(tmp_path_factory.mktemp("etcd"), is_durable=False)
    etcd.start()
    yield etcd
    etcd.stop()


@pytest.fixture(scope="session")
def mesh(etcd: EmbeddedEtcd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path_factory.mktemp("mesh"), MEMORY_BYTES, RUNTIMES, external_registry=etcd.url)
    mesh.start()
    yield mesh
    mesh.stop()


@pytest.fixture
def client(mesh: Mesh) -> Iterator[Client]:
    with Client(mesh.target, timeout_s=30) as client:
        yield client


@pytest.fixture(scope="session")
def new_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainedModel]:
    """Trains a model nobody had before: `new_model("xgboost")`; its name is its own as well."""
    folder = tmp_path_factory.mktemp("models")
    numbers = itertools.count()

    def make(kind: str = "xgboost", data_set: str = "diabetes") -> TrainedModel:
        return train_one(Recipe(3, kind, data_set), Order(next(numbers)), folder)

    return make


@pytest.fixture
def registered(client: Client, new_model: Callable[..., TrainedModel]) -> Iterator[Callable[..., TrainedModel]]:
    """A new model, registered: `registered("onnx")`. Gone when the test ends."""
    models: list[TrainedModel] = []

    def make(kind: str = "xgboost", data_set: str = "diabetes") -> TrainedModel:
        model = new_model(kind, data_set)
        client.register(model.name, model.uri, model.type, key=model.key)
        models.append(model)
        return model

    yield make
    for model in models:
        client.unregister(model.name)


class Traffic:
    """Callers that ask models without a pause and check each answer, in threads of their own."""

    def __init__(self, target: str, models: list[TrainedModel], callers: int = 4) -> None:
        self._target = target
        self._models = models
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(callers)]
        self._lock = threading.Lock()
        self.right = 0
        self.wrong: list[str] = []
        self.failed: list[str] = []

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        # No second tries: what fails here has failed for a plain client.
        protocol = ("grpc", "rest")[number % 2]
        with Client(self._target, protocol=protocol, timeout_s=30, retries=0) as client:
            for turn in itertools.count(number):
                if self._stopping.is_set():
                    return
                model = self._models[turn % len(self._models)]
                row = turn % len(model.rows)
                try:
                    prediction = client.predict(model.name, {model.input_name: model.rows[row : row + 1]})
                    complaint = model.explain_wrong(row, 1, prediction.outputs)
                except Exception as error:
                    with self._lock:
                        self.failed.append(f"{protocol} {model.name}: {error}")
                    time.sleep(0.01)
                    continue
                with self._lock:
                    if complaint:
                        self.wrong.append(complaint)
                    else:
                        self.right += 1

    def served_share(self) -> float:
        """Right answers among all requests."""
        return self.right / max(1, self.right + len(self.failed) + len(self.wrong))

    def wait_for(self, more: int, timeout_s: float = 30.0) -> None:
        """Waits until `more` right answers came from now on."""
        aim = self.right + more
        wait_until(lambda: self.right >= aim, timeout_s, f"{more} more right answers; failed: {self.failed[-3:]}")


def wait_until(is_true: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Polls until `is_true`; fails the test, saying `what` was waited for, after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        # What is polled may be down on purpose.
        with contextlib.suppress(OSError, RuntimeError, LookupError):
            if is_true():
                return
        if time.monotonic() > deadline:
            pytest.fail(f"after {timeout_s:.0f} s still waiting for {what}")
        time.sleep(0.1)


@pytest.fixture
def traffic(mesh: Mesh) -> Callable[..., Traffic]:
    """Starts traffic: `with traffic([model, ...]) as running:`."""
    return lambda models, callers=4: Traffic(mesh.target, models, callers)


@pytest.fixture
def eventually() -> Callable[..., None]:
    """`eventually(lambda: condition, timeout_s, "what")` waits for a condition."""
    return wait_until
