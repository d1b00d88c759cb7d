"""The benchmarks: each takes a running mesh and models, measures one thing, and checks the answers it measured.

Rule of the file: no number without a check that the work was done.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import closed_loop
import h2load
import questions
from catalogue import TrainedModel
from launching import Mesh, free_port
from raymesh.mesh.client import AsyncClient, Client, ModelSpec
from raymesh.mesh.client_base import BATCH_MODELS
from recorder import percentile
from workload import Zipf

Say = Callable[[str], None]
INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"
#: Requests in flight in the throughput measurements.
IN_FLIGHT = 64
#: Length of one throughput run.
RUN_S = 5.0
RUNS = 3
PEER_START_S = 90.0


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One number beside what it should reach. `is_reached` is None where there is no aim."""

    name: str
    value: str
    aim: str = ""
    is_reached: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a benchmark found, for the table, and everything it measured, for the JSON file."""

    findings: list[Finding]
    details: dict[str, Any]


def register(client: Client, models: list[TrainedModel]) -> float:
    """Registers `models`; how many a second."""
    begin_s = time.perf_counter()
    summary = client.register_many([ModelSpec(m.name, m.uri, m.type, m.key) for m in models])
    if summary.failed:
        raise RuntimeError(f"{len(summary.failed)} registrations failed, the first: {summary.failed[0]}")
    return summary.registered / (time.perf_counter() - begin_s)


def check_answer(client: Client, model: TrainedModel) -> bool:
    """Asks for all rows of a model, raises `RuntimeError` when the answer is wrong; whether the request was cold."""
    prediction = client.predict(model.name, {model.input_name: model.rows})
    if wrong := model.explain_wrong(0, len(model.rows), prediction.outputs):
        raise RuntimeError(wrong)
    return prediction.cold


def measure_warm(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """One model of 50 trees over gRPC, 64 in flight: through the front door, and straight at its runtime's port."""
    model = models[0]
    with Client(mesh.target) as client:
        register(client, [model])
        check_answer(client, model)
    body = folder / "model-infer.grpc"
    body.write_bytes(questions.grpc_frame(model))
    runtime = mesh.runtime_that_holds(model.name)
    internal = {"x-raymesh-token": mesh.token, "x-raymesh-model": f"default/{model.name}"}
    headers = {"content-type": "application/grpc", "te": "trailers"}
    answer_bytes = {
        "front door": probe(mesh.target, model, body.read_bytes(), headers),
        "runtime": probe(runtime, model, body.read_bytes(), headers | internal),
    }

    def run(where: str, requests: int) -> h2load.Load:
        if where == "front door":
            url, extra, clients, streams = f"http://{mesh.target}{INFER_PATH}", {}, 4, IN_FLIGHT // 4
        else:
            url, extra, clients, streams = f"http://{runtime}{INFER_PATH}", internal, IN_FLIGHT, 1
        load = h2load.run_h2load(
            url, body, requests, clients=clients, streams=streams, headers=headers | extra, is_http1=where == "runtime"
        )
        load.check(answer_bytes[where])
        return load

    sizes = {where: max(1000, int(run(where, 5000).requests_per_s * RUN_S)) for where in answer_bytes}
    runs: dict[str, list[h2load.Load]] = {where: [] for where in answer_bytes}
    for number in range(RUNS):
        for where, requests in sizes.items():
            load = run(where, requests)
            runs[where].append(load)
            say(f"run {number + 1}, {where}: {load.requests_per_s:,.0f} requests/s, mean {load.mean_ms:.2f} ms")
    through, straight = (statistics.median(load.requests_per_s for load in runs[w]) for w in ("front door", "runtime"))
    return Outcome(
        [
            Finding("warm gRPC through the front door", f"{through:,.0f}/s", "≥ 18,000/s", through >= 18_000),
            Finding("  straight at the runtime", f"{straight:,.0f}/s"),
            Finding("  ratio", f"{through / straight:.2f}", "≥ 0.60", through / straight >= 0.6),
        ],
        {where: [dataclasses.asdict(load) for load in loads] for where, loads in runs.items()},
    )


def probe(address: str, model: TrainedModel, body: bytes, headers: dict[str, str]) -> int:
    """One gRPC call over HTTP/1.1: checks the answer and gives its length in bytes."""
    with contextlib.closing(http.client.HTTPConnection(address, timeout=10)) as connection:
        connection.request("POST", INFER_PATH, body, headers)
        answer = connection.getresponse()
        frame = answer.read()
    if not frame:
        raise RuntimeError(f"{address} answers {answer.status} {dict(answer.getheaders())}")
    if not questions.ends_with_answer(model)(np.ascontiguousarray(questions.read_grpc_frame(frame)).tobytes()):
        raise RuntimeError(f"{address} gives a wrong answer")
    return len(frame)


def measure_many(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """All `models` loaded, Zipf(1.0), REST binary through the front door, 64 in flight. The peer follows apart."""
    with Client(mesh.target) as client:
        register(client, models)
    host, port = mesh.target.split(":")
    ours = [questions.rest_binary(model, mesh.target) for model in models]
    rates = drive_many(host, int(port), ours, say)
    name = f"{len(models):,} models, Zipf(1.0), REST binary"
    return Outcome(findings_of(name, rates), {"raymesh": rates})


def measure_many_peer(models: list[TrainedModel], replicas: int, say: Say) -> dict[str, Any]:
    """The same models, questions and client against Ray Serve multiplexing."""
    with started_peer(models, replicas) as port:
        return drive_many("127.0.0.1", port, [questions.ray_serve(model) for model in models], say)


def drive_many(host: str, port: int, asked: list[closed_loop.Question], say: Say) -> dict[str, Any]:
    """Loads everything with one request each, then `RUNS` timed runs; the rates and the latencies of the median."""

    def checked(outcome: closed_loop.Outcome) -> closed_loop.Outcome:
        if outcome.errors or outcome.wrong:
            raise RuntimeError(f"{outcome.errors} errors, {outcome.wrong} wrong: {outcome.first_error}")
        return outcome

    # Twice: a peer may answer from a replica that must then load the model again elsewhere.
    for _ in range(2):
        checked(asyncio.run(closed_loop.drive(host, port, closed_loop.each_once(asked), connections=8)))
    rng = random.Random(1)
    zipf = Zipf(len(asked), 1.0, rng)
    outcomes = []
    for number in range(RUNS):
        draws = closed_loop.until(RUN_S, lambda: asked[zipf.draw(rng)])
        outcomes.append(checked(asyncio.run(closed_loop.drive(host, port, draws, connections=IN_FLIGHT))))
        say(f"run {number + 1}: {outcomes[-1].requests_per_s:,.0f} requests/s")
    median = sorted(outcomes, key=lambda outcome: outcome.requests_per_s)[RUNS // 2]
    return {
        "requests_per_s": [outcome.requests_per_s for outcome in outcomes],
        "median_requests_per_s": median.requests_per_s,
        "p50_ms": percentile(median.latencies_ms, 50),
        "p99_ms": percentile(median.latencies_ms, 99),
    }


def findings_of(name: str, rates: dict[str, Any]) -> list[Finding]:
    """What `drive_many` gave, for the table."""
    return [
        Finding(name, f"{rates['median_requests_per_s']:,.0f}/s"),
        Finding("  p50 / p99", f"{rates['p50_ms']:.1f} / {rates['p99_ms']:.1f} ms"),
    ]


@contextlib.contextmanager
def started_peer(models: list[TrainedModel], replicas: int) -> Iterator[int]:
    """Ray Serve with the peer application; its port. Gone afterwards."""
    port = free_port()
    script = Path(__file__).parent / "peers" / "ray_serve.py"
    options = {
        "--models": models[0].path.parent,
        "--features": models[0].rows.shape[1],
        "--port": port,
        "--replicas": replicas,
        "--models-max": len(models),
    }
    command = [sys.executable, str(script), *(str(part) for pair in options.items() for part in pair)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin and process.stdout
    try:
        begin_s = time.monotonic()
        for line in process.stdout:
            if line.strip() == "ready":
                break
            if time.monotonic() - begin_s > PEER_START_S:
                raise RuntimeError("the peer did not start in time")
        else:
            raise RuntimeError("the peer ended before it was ready")
        yield port
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure_cold(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """The first prediction of registered models that are not loaded, one after the other."""
    with Client(mesh.target) as client:
        register(client, models)
        # The first load of a type imports its library; that is a start-up cost, not a model's.
        for model in models[:5]:
            check_answer(client, model)
        latencies_ms, warm = [], 0
        for model in models[5:]:
            begin_s = time.perf_counter()
            is_cold = check_answer(client, model)
            latencies_ms.append((time.perf_counter() - begin_s) * 1e3)
            warm += not is_cold
    if warm:
        raise RuntimeError(f"{warm} of {len(latencies_ms)} first predictions did not say that they were cold")
    values = np.array(latencies_ms)
    p50, p99 = percentile(values, 50), percentile(values, 99)
    size_kb = statistics.mean(model.path.stat().st_size for model in models) / 1000
    return Outcome(
        [
            Finding(f"first prediction, {size_kb:.0f} KB models, p50", f"{p50:.1f} ms", "≤ 15 ms", p50 <= 15),
            Finding("  p99", f"{p99:.1f} ms"),
        ],
        {"latencies_ms": latencies_ms, "mean_file_bytes": size_kb * 1000},
    )


def measure_cold_8(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """First predictions of models that are not loaded by 8 clients at once, while another asks for loaded models."""
    warm_models, cold_models = models[:20], models[20:]
    with Client(mesh.target) as client:
        register(client, models)
        for model in warm_models:
            check_answer(client, model)
    cold_ms: list[float] = []
    warm_ms: list[float] = []
    colds = 0

    async def ask(client: AsyncClient, model: TrainedModel, latencies_ms: list[float]) -> bool:
        begin_s = time.perf_counter()
        prediction = await client.predict(model.name, {model.input_name: model.rows[:1]})
        latencies_ms.append((time.perf_counter() - begin_s) * 1e3)
        if wrong := model.explain_wrong(0, 1, prediction.outputs):
            raise RuntimeError(wrong)
        return prediction.cold

    async def ask_cold(client: AsyncClient, left: Iterator[TrainedModel]) -> None:
        nonlocal colds
        for model in left:
            is_cold = await ask(client, model, cold_ms)
            colds += is_cold

    async def ask_warm(client: AsyncClient) -> None:
        rng = random.Random(1)
        while True:
            await ask(client, rng.choice(warm_models), warm_ms)
            await asyncio.sleep(0.002)

    async def run() -> float:
        async with AsyncClient(mesh.target) as client, asyncio.TaskGroup() as group:
            asking = group.create_task(ask_warm(client))
            begin_s = time.perf_counter()
            left = iter(cold_models)
            await asyncio.gather(*(ask_cold(client, left) for _ in range(8)))
            seconds = time.perf_counter() - begin_s
            asking.cancel()
        return seconds

    seconds = asyncio.run(run())
    if colds != len(cold_models):
        raise RuntimeError(f"{colds} of {len(cold_models)} first predictions said that they were cold")
    cold, warm = np.array(cold_ms), np.array(warm_ms)
    p50, p99 = percentile(cold, 50), percentile(cold, 99)
    warm_p50, warm_p99 = percentile(warm, 50), percentile(warm, 99)
    return Outcome(
        [
            Finding("first predictions, 8 clients, p50", f"{p50:.1f} ms"),
            Finding("  p99", f"{p99:.1f} ms", "≤ 50 ms", p99 <= 50),
            Finding("  loads and answers", f"{len(cold) / seconds:,.0f}/s"),
            Finding("  warm requests meanwhile, p50 / p99", f"{warm_p50:.1f} / {warm_p99:.1f} ms"),
        ],
        {"cold_ms": cold_ms, "warm_ms": warm_ms, "seconds": seconds},
    )


def measure_herd(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """500 concurrent first requests to one model: one load, all answered, all right."""
    model, callers = models[0], 500
    with Client(mesh.target) as client:
        register(client, [model])
    loads_before = sum(status["loads"] for status in mesh.runtime_statuses())

    async def ask_all() -> list[str]:
        async with AsyncClient(mesh.target, retries=0) as client:
            asked = [client.predict(model.name, {model.input_name: model.rows[:1]}) for _ in range(callers)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
        return [
            str(answer) if isinstance(answer, BaseException) else model.explain_wrong(0, 1, answer.outputs)
            for answer in answers
        ]

    begin_s = time.perf_counter()
    complaints = [text for text in asyncio.run(ask_all()) if text]
    seconds = time.perf_counter() - begin_s
    loads = sum(status["loads"] for status in mesh.runtime_statuses()) - loads_before
    if complaints:
        say(f"first complaint: {complaints[0]}")
    return Outcome(
        [
            Finding(f"{callers} concurrent first requests: loads", str(loads), "= 1", loads == 1),
            Finding("  answered right", f"{callers - len(complaints)}", f"= {callers}", not complaints),
            Finding("  all answered after", f"{seconds * 1e3:,.0f} ms"),
        ],
        {"loads": loads, "complaints": complaints[:10], "seconds": seconds},
    )


def measure_density(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """How many models a GiB of the runtimes' growth holds."""
    with Client(mesh.target) as client:
        rate = register(client, models)
        warm_up = models[:50]
        for model in warm_up:
            check_answer(client, model)
        before = mesh.runtime_statuses()
        begin_s = time.perf_counter()
        for model in models[len(warm_up) :]:
            check_answer(client, model)
        seconds = time.perf_counter() - begin_s
        after = mesh.runtime_statuses()
    loaded = sum(s["copies"] for s in after) - sum(s["copies"] for s in before)
    grown = sum(s["rss_bytes"] for s in after) - sum(s["rss_bytes"] for s in before)
    booked = sum(s["used_bytes"] for s in after) - sum(s["used_bytes"] for s in before)
    per_gib = loaded / (grown / 1024**3)
    return Outcome(
        [
            Finding(f"models per GiB of growth ({loaded:,} loaded)", f"{per_gib:,.0f}", "≥ 8,000", per_gib >= 8000),
            Finding(
                "  growth per model, real / booked", f"{grown / loaded / 1e3:.0f} / {booked / loaded / 1e3:.0f} kB"
            ),
            Finding("  loaded and checked one by one", f"{loaded / seconds:,.0f}/s"),
        ],
        {"loaded": loaded, "grown_bytes": grown, "booked_bytes": booked, "register_rate": rate, "seconds": seconds},
    )


def measure_register(mesh: Mesh, models: list[TrainedModel], folder: Path, say: Say) -> Outcome:
    """Registrations a second by one client: in bulk, and with a call for each model. Nothing is loaded."""

    def rate_of(prefix: str, batch: int) -> float:
        # The same files under many names.
        uris = [models[number % len(models)].uri for number in range(10_000)]
        specs = [ModelSpec(f"{prefix}-{number:05d}", uri, "xgboost") for number, uri in enumerate(uris)]
        begin_s = time.perf_counter()
        summary = client.register_many(specs, batch=batch)
        seconds = time.perf_counter() - begin_s
        if summary.failed:
            raise RuntimeError(f"{len(summary.failed)} registrations failed, the first: {summary.failed[0]}")
        return summary.registered / seconds

    with Client(mesh.target) as client:
        in_bulk, one_each = rate_of("bulk", BATCH_MODELS), rate_of("each", 1)
    return Outcome(
        [
            Finding("registrations, one client, in bulk", f"{in_bulk:,.0f}/s", "≥ 1,500/s", in_bulk >= 1500),
            Finding("  one call each", f"{one_each:,.0f}/s"),
        ],
        {"in_bulk_per_s": in_bulk, "one_call_each_per_s": one_each},
    )
