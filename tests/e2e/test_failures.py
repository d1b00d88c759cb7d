"""What breaks while requests are answered, and what must not break with it."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from catalogue import TrainedModel
from launching import Mesh
from raymesh.mesh.client import Client, MeshError
from raymesh.registry.embedded import EmbeddedEtcd
from raymesh.runtimes.errors import Code

#: Of the requests sent while something is being killed, this share must get a right answer at the first try.
SERVED_SHARE_MIN = 0.99


def test_a_killed_runtime_is_covered_and_replaced(
    mesh: Mesh,
    client: Client,
    registered: Callable[..., TrainedModel],
    traffic: Callable[..., object],
    eventually: Callable[..., None],
) -> None:
    models = [registered() for _ in range(8)]
    for model in models:
        client.predict(model.name, model.rows[:1])
    victim = mesh.runtime_that_holds(models[0].name)
    before = set(mesh.instances())
    with traffic(models) as running:
        running.wait_for(200)
        os.kill(mesh.ask_runtime(victim, "/control/status")["pid"], signal.SIGKILL)
        running.wait_for(500)
        eventually(lambda: len(set(mesh.instances()) - before) >= 1, 90, "a runtime in the place of the killed one")
        eventually(
            lambda: victim not in {record.address for record in mesh.instances().values()},
            30,
            "the victim's record to go",
        )
        running.wait_for(200)
    assert running.wrong == []
    assert running.served_share() >= SERVED_SHARE_MIN, running.failed[:5]
    # An id is used once for ever: the replacement is another instance.
    assert len(mesh.instances()) == len(before)


def test_warm_traffic_outlives_etcd(
    mesh: Mesh,
    etcd: EmbeddedEtcd,
    client: Client,
    registered: Callable[..., TrainedModel],
    new_model: Callable[..., TrainedModel],
    traffic: Callable[..., object],
    eventually: Callable[..., None],
) -> None:
    models = [registered() for _ in range(8)]
    for model in models:
        client.predict(model.name, model.rows[:1])
    late = new_model()
    with traffic(models) as running:
        running.wait_for(200)
        os.kill(etcd.pid, signal.SIGKILL)
        eventually(lambda: not etcd.pid, 10, "etcd to die")
        # Longer than a lease lives: nothing may be unloaded because the registry is silent.
        gone_until_s = time.monotonic() + 8
        begin_s = time.monotonic()
        with pytest.raises(MeshError) as refused:
            client.register(late.name, late.uri, late.type, timeout_s=20)
        assert refused.value.code is Code.UNAVAILABLE
        assert time.monotonic() - begin_s < 15
        eventually(lambda: time.monotonic() > gone_until_s, 30, "the lease's time to pass")
        running.wait_for(200)
        etcd.start()
        eventually(lambda: can_register(client, late), 30, "registrations to work again")
        running.wait_for(200)
    assert running.wrong == []
    assert running.served_share() >= SERVED_SHARE_MIN, running.failed[:5]
    assert late.explain_wrong(0, 4, client.predict(late.name, late.rows[:4]).outputs) == ""
    eventually(lambda: len(mesh.instances()) == 2, 20, "both runtimes in the registry again")
    client.unregister(late.name)


def can_register(client: Client, model: TrainedModel) -> bool:
    try:
        client.register(model.name, model.uri, model.type, timeout_s=5)
    except MeshError:
        return False
    return True


def test_a_restarted_mesh_knows_every_registration(mesh: Mesh, registered: Callable[..., TrainedModel]) -> None:
    models = [registered(kind) for kind in ("xgboost", "sklearn", "onnx") * 4]
    mesh.stop()
    mesh.start()
    with Client(mesh.target) as client:
        assert {model.name for model in models} <= {listed["name"] for listed in client.list()}
        for model in models:
            answer = client.predict(model.name, {model.input_name: model.rows})
            assert answer.cold
            assert model.explain_wrong(0, len(model.rows), answer.outputs) == ""
