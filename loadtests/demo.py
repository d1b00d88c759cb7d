"""`make demo`: a thousand real models behind one endpoint, with every answer checked.

Trains a small model for each of 1,000 customers, starts a mesh with memory for about a third of them, registers all
through gRPC, then sends Zipf-distributed traffic over gRPC and REST from several client processes while customers are
added, retrained and removed. Every answer is compared with what the model's own library said offline. The exit code is
1 if a single one was wrong, or a single request failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from catalogue import Order, Recipe, TrainedModel, train_catalogue
from client_process import PROTOCOLS, Assignment, Begin, Stop, Use, run_client
from launching import Mesh, started_mesh
from raymesh.mesh.client import Client, MeshError, ModelSpec
from raymesh.runtimes.errors import Code
from recorder import Recorder, Requests, Temperature, percentile
from report import Machine, draw_latency
from workload import Change, ChangeKind, plan_churn

ROOT = Path(__file__).parents[1]
#: What a loaded model takes for each byte of its file, measured on this catalogue; it sets the mesh's memory.
LOADED_BYTES_PER_FILE_BYTE = {"xgboost": 1.25, "sklearn": 0.27, "onnx": 59.0}
#: Share of the models that fits in the mesh's memory.
FITTING_SHARE = 1 / 3
#: A runtime with less than a few MiB may find no room for its first load, which imports the library as well.
MEMORY_BYTES_MIN = 12 * 1024**2
#: Share of the customers that is added during the traffic; the same again is retrained, and removed.
CHURN_SHARE = 0.05
#: A caller that hears nothing for this long ends the demo: it should have been told something.
SILENCE_S = 120.0

Answer = TypeVar("Answer")

console = Console()


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What the table shows, and what decides the exit code."""

    registered: int
    loaded: int
    evicted: int
    loads: int
    register_rate: float
    seconds: float
    changes: list[Change]
    answered_after_removal: int
    requests: Requests

    @property
    def is_right(self) -> bool:
        """Whether every answer was the model's, every request was answered, and removed models were silent."""
        return not (self.requests.wrong_count or self.requests.failures_count or self.answered_after_removal)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000, help="customers at the start (default 1000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the traffic (default 60)")
    parser.add_argument("--clients", type=int, default=3, help="client processes (default 3)")
    parser.add_argument("--callers", type=int, default=6, help="concurrent callers in each client (default 6)")
    parser.add_argument("--exponent", type=float, default=1.0, help="of the Zipf distribution (default 1.0)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="train again, even if the models are there")
    parser.add_argument("--keep", action="store_true", help="leave the mesh running afterwards")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="models, logs and the picture")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    machine = Machine.here()
    console.print(f"[bold]raymesh demo[/bold] on {machine}")
    churn = int(options.models * CHURN_SHARE)
    changes = plan_churn(
        options.models,
        added=churn,
        retrained=churn,
        removed=churn,
        seconds=options.seconds,
        rng=random.Random(options.seed),
    )
    models = train(options, changes)
    memory_bytes = memory_for_a_share([models[Order(customer)] for customer in range(options.models)])
    with started_mesh(options.out / "mesh", memory_bytes=memory_bytes, keep=options.keep) as mesh:
        console.print(
            f"mesh ready at {mesh.target} after {mesh.start_s:.1f} s, {memory_bytes / 1024**2:.0f} MiB for models"
        )
        result = run(mesh, options, models, changes)
    picture = options.out / "latency.png"
    if len(result.requests.at_s):
        title = f"raymesh: {result.registered:,} models behind one endpoint, memory for about a third of them"
        draw_latency(result.requests, changes, title, picture)
    show(result, machine, picture)
    return 0 if result.is_right else 1


def train(options: argparse.Namespace, changes: list[Change]) -> dict[Order, TrainedModel]:
    """The models of all customers there will be, and the second models of those that are retrained."""
    added = sum(change.kind is ChangeKind.ADDED for change in changes)
    orders = [Order(customer) for customer in range(options.models + added)]
    orders += [Order(change.customer, 2) for change in changes if change.kind is ChangeKind.RETRAINED]
    begin_s = time.monotonic()
    with progress_bar() as progress:
        task = progress.add_task("training models", total=len(orders))
        models = train_catalogue(
            options.out / "models",
            orders,
            Recipe(options.seed),
            fresh=options.fresh,
            progress=lambda done: progress.advance(task, done),
        )
    size_mib = sum(model.path.stat().st_size for model in models.values()) / 1024**2
    console.print(f"{len(models):,} models, {size_mib:.0f} MiB on disk, in {time.monotonic() - begin_s:.1f} s")
    return models


def progress_bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def memory_for_a_share(models: list[TrainedModel]) -> int:
    """Bytes that hold about `FITTING_SHARE` of `models` when loaded, and no less than `MEMORY_BYTES_MIN`."""
    loaded = sum(model.path.stat().st_size * LOADED_BYTES_PER_FILE_BYTE[model.type] for model in models)
    return max(MEMORY_BYTES_MIN, int(loaded * FITTING_SHARE))


def run(mesh: Mesh, options: argparse.Namespace, models: dict[Order, TrainedModel], changes: list[Change]) -> Result:
    """Registers, sends the traffic, and counts."""
    with Client(mesh.target) as management:
        current = {customer: models[Order(customer)] for customer in range(options.models)}
        rate = register_all(management, list(current.values()))
        with started_clients(mesh, options, customers=max(order.customer for order in models) + 1) as pipes:
            for customer, model in current.items():
                tell_all(pipes, customer, model.name)
            begin_s = time.monotonic()
            for pipe in pipes:
                pipe.send(Begin(begin_s))
            answered_after_removal = apply_changes(management, pipes, models, current, changes, begin_s)
            time.sleep(max(0.0, begin_s + options.seconds - time.monotonic()))
            for pipe in pipes:
                pipe.send(Stop())
            recorders = [expect(pipe, Recorder) for pipe in pipes]
            seconds = time.monotonic() - begin_s
        listed = management.list()
        statuses = mesh.runtime_statuses()
        return Result(
            registered=len(listed),
            loaded=sum(status["copies"] for status in statuses),
            evicted=sum(status["evictions"] for status in statuses),
            loads=sum(status["loads"] for status in statuses),
            register_rate=rate,
            seconds=seconds,
            changes=changes,
            answered_after_removal=answered_after_removal,
            requests=Requests.of(recorders),
        )


def register_all(management: Client, models: list[TrainedModel]) -> float:
    """Registers `models` through gRPC; registrations a second."""
    begin_s = time.monotonic()
    summary = management.register_many([spec_of(model) for model in models])
    elapsed_s = time.monotonic() - begin_s
    if summary.failed:
        raise SystemExit(f"{len(summary.failed)} registrations failed, the first: {summary.failed[0]}")
    rate = summary.registered / elapsed_s
    console.print(f"{summary.registered:,} models registered through gRPC in {elapsed_s:.2f} s ({rate:,.0f} a second)")
    return rate


def spec_of(model: TrainedModel) -> ModelSpec:
    return ModelSpec(name=model.name, uri=model.uri, type=model.type, key=model.key)


@contextlib.contextmanager
def started_clients(mesh: Mesh, options: argparse.Namespace, *, customers: int) -> Iterator[list[Connection]]:
    """The client processes, connected and waiting; they are gone afterwards, however it ends."""
    has_tritonclient = find_spec("tritonclient") is not None
    processes, pipes = [], []
    context = multiprocessing.get_context("spawn")
    try:
        for number in range(options.clients):
            protocols = [PROTOCOLS[caller % 2] for caller in range(options.callers)]
            if number == 0 and has_tritonclient:
                protocols[-2:] = PROTOCOLS[2:]
            ours, theirs = context.Pipe()
            assignment = Assignment(
                target=mesh.target,
                catalogue=options.out / "models" / "catalogue.pickle",
                protocols=tuple(protocols),
                slots=customers,
                exponent=options.exponent,
                ranks_seed=options.seed,
                seed=options.seed * 1000 + number,
            )
            process = context.Process(target=run_client, args=(assignment, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        for pipe in pipes:
            expect(pipe, str)
        used = ", ".join(PROTOCOLS if has_tritonclient else PROTOCOLS[:2])
        console.print(f"{options.clients} client processes, {options.clients * options.callers} callers ({used})")
        yield pipes
    finally:
        for process in processes:
            process.join(timeout=10 if sys.exc_info()[0] is None else 0)
            if process.is_alive():
                process.kill()
                process.join()


def expect(pipe: Connection, kind: type[Answer]) -> Answer:
    """The next message of a client."""
    if not pipe.poll(SILENCE_S):
        raise SystemExit(f"a client said nothing for {SILENCE_S:.0f} s")
    try:
        message = pipe.recv()
    except EOFError:
        raise SystemExit("a client process died; its error is above") from None
    if not isinstance(message, kind):
        raise TypeError(f"a client sent {message!r} instead of a {kind.__name__}")
    return message


def tell_all(pipes: list[Connection], customer: int, model_name: str | None) -> None:
    """Moves all clients to a customer's new model and waits until none has a request to the old one under way."""
    for pipe in pipes:
        pipe.send(Use(customer, model_name))
    for pipe in pipes:
        expect(pipe, int)


def apply_changes(
    management: Client,
    pipes: list[Connection],
    models: dict[Order, TrainedModel],
    current: dict[int, TrainedModel],
    changes: list[Change],
    begin_s: float,
) -> int:
    """Adds, retrains and removes customers when it is time; how many removed models still answered (must be 0)."""
    answered_after_removal = 0
    with progress_bar() as progress:
        task = progress.add_task("customers change while others are served", total=len(changes))
        for change in changes:
            time.sleep(max(0.0, begin_s + change.at_s - time.monotonic()))
            old = current.pop(change.customer, None)
            if change.kind is not ChangeKind.REMOVED:
                new = models[Order(change.customer, 2 if change.kind is ChangeKind.RETRAINED else 1)]
                management.register(new.name, new.uri, new.type, key=new.key)
                current[change.customer] = new
                tell_all(pipes, change.customer, new.name)
            else:
                tell_all(pipes, change.customer, None)
            if old is not None:
                management.unregister(old.name)
                answered_after_removal += still_answers(management, old)
            progress.advance(task)
    return answered_after_removal


def still_answers(client: Client, model: TrainedModel) -> bool:
    """Whether an unregistered model is anything but unknown."""
    try:
        client.predict(model.name, {model.input_name: model.rows[:1]})
    except MeshError as error:
        return error.code is not Code.NOT_FOUND
    return True


def show(result: Result, machine: Machine, picture: Path) -> None:
    """The table, and the first of what went wrong."""
    requests = result.requests
    warm, cold = requests.latencies_ms(Temperature.WARM), requests.latencies_ms(Temperature.COLD)
    counts = {kind: sum(change.kind is kind for change in result.changes) for kind in ChangeKind}

    def latency(percent: float) -> str:
        return f"warm {percentile(warm, percent):,.1f} ms   cold {percentile(cold, percent):,.1f} ms"

    def verdict(count: int) -> str:
        return f"[bold green]{count:,}[/]" if count == 0 else f"[bold red]{count:,}[/]"

    table = Table(title="raymesh demo", caption=str(machine), show_header=False, title_style="bold", min_width=64)
    table.add_row("models registered / loaded now", f"{result.registered:,} / {result.loaded:,}")
    table.add_row("loads / evictions", f"{result.loads:,} / {result.evicted:,}")
    table.add_row("registrations a second (gRPC)", f"{result.register_rate:,.0f}")
    table.add_row("customers while serving", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    table.add_section()
    table.add_row("requests, all answers checked", f"{len(requests.at_s):,}")
    for number, name in enumerate(PROTOCOLS):
        if count := int((requests.client == number).sum()):
            table.add_row(f"  of them {name}", f"{count:,}")
    table.add_row("wrong answers", verdict(requests.wrong_count))
    table.add_row("failed requests", verdict(requests.failures_count))
    table.add_row("answers of removed models", verdict(result.answered_after_removal))
    table.add_section()
    table.add_row("cold requests", f"{len(cold):,} ({len(cold) / max(1, len(requests.at_s)):.1%})")
    table.add_row("p50", latency(50))
    table.add_row("p99", latency(99))
    table.add_row("requests a second", f"{len(requests.at_s) / result.seconds:,.0f}")
    console.print(table)
    if picture.is_file():
        console.print(f"latency over time: {picture}")
    for text in requests.wrong[:5] + requests.failures[:5]:
        console.print(f"[red]{text}[/red]", highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
