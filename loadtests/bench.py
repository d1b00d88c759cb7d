"""`make bench`: what this machine reaches, beside what the project aims at.

    python loadtests/bench.py [warm] [many] [cold] [herd] [density] [register] [cold-8]    (nothing named: all)

Each benchmark checks the answers it measures. Results go to `out/bench/*.json` with the machine's description. Never a
test: a busy machine gives other numbers, which is why the load average before is printed beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

import h2load
import measures
from catalogue import Order, Recipe, TrainedModel, train_catalogue
from launching import Mesh, started_mesh
from measures import Finding, Outcome
from report import Machine

ROOT = Path(__file__).parents[1]
#: Trees for regression on the diabetes data, fifty of them: about 60 KB a file.
RECIPE = Recipe(seed=2, only_type="xgboost", only_data_set="diabetes")

console = Console()


@dataclasses.dataclass(frozen=True, slots=True)
class Benchmark:
    """How to measure one thing, and with how many models of its own."""

    measure: Callable[[Mesh, list[TrainedModel], Path, measures.Say], Outcome]
    models: int


#: In the order they run. No model is used by two of them, so none finds a model loaded that should be cold.
BENCHMARKS = {
    "warm": Benchmark(measures.measure_warm, 1),
    "cold": Benchmark(measures.measure_cold, 305),
    "herd": Benchmark(measures.measure_herd, 1),
    "many": Benchmark(measures.measure_many, 1000),
    "density": Benchmark(measures.measure_density, 2050),
    "register": Benchmark(measures.measure_register, 1),
    "cold-8": Benchmark(measures.measure_cold_8, 620),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--no-peer", action="store_true", help="leave out Ray Serve in `many`")
    parser.add_argument("--runtimes", type=int, default=0, help="runtime processes (default: one per core)")
    parser.add_argument("--memory", default=8, type=float, metavar="GiB", help="memory for models (default 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))} (there are {', '.join(BENCHMARKS)})")
    names = [name for name in BENCHMARKS if not options.names or name in options.names]
    if "warm" in names and not h2load.is_installed():
        console.print(f"[yellow]{h2load.HOW_TO_INSTALL}; `warm` is left out[/yellow]")
        names.remove("warm")
    models = share_models(train(options.out))
    machine = Machine.here()
    console.print(f"[bold]raymesh bench[/bold] on {machine}")
    outcomes = measure_all(names, models, options)
    if "many" in outcomes and not options.no_peer:
        console.rule("many, the peer: Ray Serve @serve.multiplexed")
        compare_with_peer(outcomes["many"], models["many"], options.runtimes or machine.cores)
    for name, outcome in outcomes.items():
        save(options.out / f"{name}.json", name, outcome, machine)
    show([finding for outcome in outcomes.values() for finding in outcome.findings], machine)
    return 0


def train(out: Path) -> list[TrainedModel]:
    """The models for all benchmarks, the same whichever run, so that the cache serves."""
    orders = [Order(number) for number in range(sum(benchmark.models for benchmark in BENCHMARKS.values()))]
    with console.status(f"training {len(orders):,} models (once)"):
        return list(train_catalogue(out / "models", orders, RECIPE).values())


def share_models(models: list[TrainedModel]) -> dict[str, list[TrainedModel]]:
    """Each benchmark's own models."""
    shares, first = {}, 0
    for name, benchmark in BENCHMARKS.items():
        shares[name] = models[first : first + benchmark.models]
        first += benchmark.models
    return shares


def measure_all(
    names: list[str], models: dict[str, list[TrainedModel]], options: argparse.Namespace
) -> dict[str, Outcome]:
    """Runs the benchmarks one after the other on one mesh."""
    outcomes = {}
    memory_bytes = int(options.memory * 1024**3)
    with started_mesh(options.out / "mesh", memory_bytes=memory_bytes, runtimes=options.runtimes) as mesh:
        for name in names:
            console.rule(name)
            console.print(BENCHMARKS[name].measure.__doc__)
            outcomes[name] = BENCHMARKS[name].measure(mesh, models[name], options.out, console.print)
    return outcomes


def compare_with_peer(outcome: Outcome, models: list[TrainedModel], replicas: int) -> None:
    """Adds the peer's numbers, measured after the mesh is gone, to those of `many`."""
    peer = measures.measure_many_peer(models, replicas, console.print)
    outcome.details["ray serve"] = peer
    ratio = outcome.details["raymesh"]["median_requests_per_s"] / peer["median_requests_per_s"]
    outcome.findings.extend(measures.findings_of("  Ray Serve @serve.multiplexed", peer))
    outcome.findings.append(Finding("  ratio", f"{ratio:.1f}", "≥ 10", ratio >= 10))


def save(path: Path, name: str, outcome: Outcome, machine: Machine) -> None:
    """One JSON file for each benchmark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "benchmark": name,
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": dataclasses.asdict(machine),
        "findings": [dataclasses.asdict(finding) for finding in outcome.findings],
        "details": outcome.details,
    }
    path.write_text(json.dumps(body, indent=1), encoding="utf-8")


def show(findings: list[Finding], machine: Machine) -> None:
    """The table of all results."""
    table = Table(title="raymesh bench", caption=str(machine), title_style="bold")
    for column, justify in (("measured", "left"), ("result", "right"), ("aim", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for finding in findings:
        verdict = {None: "", True: "[green]reached[/]", False: "[red]missed[/]"}[finding.is_reached]
        table.add_row(finding.name, finding.value, finding.aim, verdict)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
