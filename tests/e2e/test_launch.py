"""`raymesh up` and `raymesh down` as a user meets them, with the embedded etcd."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from catalogue import TrainedModel
from launching import Mesh, free_port, raymesh
from raymesh.mesh.client import Client


def test_an_unreachable_registry_is_said_within_ten_seconds(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    done = raymesh("up", "--registry", f"etcd://127.0.0.1:{free_port()}", "--state-dir", str(tmp_path / "state"))
    assert time.monotonic() - begin_s < 10
    assert done.returncode not in (0, 1)
    assert "registry" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mesh_comes_back_with_its_models_and_leaves_nothing_behind(
    tmp_path: Path, new_model: Callable[..., TrainedModel]
) -> None:
    model = new_model("onnx")
    state = ["--state-dir", str(tmp_path / "state"), "--port", str(free_port())]
    command = [sys.executable, "-m", "raymesh.mesh.cli", "up", "--runtimes", "1", "--memory", "64MiB", *state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as up:
        assert up.stdout is not None
        try:
            assert state[-1] in up.stdout.readline()
            target = ["--target", f"127.0.0.1:{state[-1]}"]
            done = raymesh("register", model.name, model.uri, "--type", "onnx", "--load", *target)
            assert done.returncode == 0, done.stderr
            family = psutil.Process(up.pid).children(recursive=True)
            assert {"etcd", "haproxy"} <= {process.name() for process in family}
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)
    assert still_running(family) == []

    mesh = Mesh(tmp_path / "state", 64 * 1024**2, 1)
    mesh.start()
    try:
        listed = raymesh("list", "--json", "--target", mesh.target)
        assert model.name in listed.stdout
        with Client(mesh.target) as client:
            answer = client.predict(model.name, {model.input_name: model.rows})
        assert model.explain_wrong(0, len(model.rows), answer.outputs) == ""
        family = [psutil.Process(mesh.record.pid), *psutil.Process(mesh.record.pid).children(recursive=True)]
    finally:
        mesh.stop()
    assert still_running(family) == []


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended. One that only waits for its parent to notice has."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
