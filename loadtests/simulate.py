"""The mesh's decisions at scale, in virtual time: `python loadtests/simulate.py --instances 100 --models 100000`.

Runs the production placement cores (`raymesh.placement.simulation`) without sockets or processes. What it prints about
hits, loads and evictions is what the policy does to this workload; what it prints in µs is what a decision costs here.
The same arguments give the same answers on every machine, only the times differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from random import Random
from typing import Any

from raymesh.placement.attempts import Step
from raymesh.placement.simulation import Faults, Simulation, Timing


class TimedSimulation(Simulation):
    """A simulation that knows what its decisions cost on this machine's clock."""

    decision_s = 0.0

    def decide(self, *args: Any) -> Step:
        """The next step of a placement, timed."""
        start_s = time.perf_counter()
        step = super().decide(*args)
        self.decision_s += time.perf_counter() - start_s
        return step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--models", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="virtual time")
    parser.add_argument("--rate", type=float, default=5_000.0, help="requests per virtual second")
    parser.add_argument("--fit", type=float, default=0.3, help="share of the models that fits into all memory")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the popularity of models")
    parser.add_argument("--load-ms", type=int, default=30)
    parser.add_argument("--load-slots", type=int, default=2)
    parser.add_argument("--faults", type=float, default=0.0, help="probability of each kind of fault per load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    rng = Random(args.seed)
    p = args.faults
    faults = Faults(load_fails=p, load_hangs=p / 10, size_differs=p, reply_lost=p / 10, instance_lost=p / 1000)
    sim = TimedSimulation(rng, faults=faults, timing=Timing(load=args.load_ms), is_checked=False)
    names = [f"default/m{n}" for n in range(args.models)]
    sizes = [int(rng.lognormvariate(11, 1)) for _ in names]  # median 60 KB, mean 99 KB
    for name, size_bytes in zip(names, sizes, strict=True):
        sim.register(name, size_bytes)
    # No instance smaller than the largest model.
    capacity_bytes = max(int(sum(sizes) * args.fit / args.instances), 2 * max(sizes))
    for _ in range(args.instances):
        sim.add_instance(capacity_bytes, load_slots=args.load_slots)
    weights = list(itertools.accumulate(rank**-args.zipf for rank in range(1, args.models + 1)))
    start_s = time.perf_counter()
    requests = 0
    for slice_ms in range(0, int(args.seconds * 1000), 100):  # in slices, so that the queue of events stays short
        arrivals = rng.choices(names, cum_weights=weights, k=int(args.rate / 10))
        requests += len(arrivals)
        for name in arrivals:
            sim.at(slice_ms + rng.randrange(100), sim.request, name)
        sim.run_until(slice_ms + 99)
    sim.run_until(sim.now_ms + 10 * sim.timing.load_timeout)
    wall_s = time.perf_counter() - start_s
    if sim.open:
        raise SystemExit(f"seed {args.seed}: {len(sim.open)} requests were never answered")
    for instance in sim.instances.values():
        instance.cache.validate()
    decisions = sim.counts["decisions"]
    return {
        "instances": args.instances,
        "models": args.models,
        "virtual_s": args.seconds,
        "seed": args.seed,
        "requests": requests,
        "answers": dict(sorted(sim.answers.items())),
        "warm_share": round(sim.answers["warm"] / max(1, requests), 4),
        "loads": sim.counts["loads"],
        "evictions": sim.counts["evictions"],
        "decisions": decisions,
        "wall_s": round(wall_s, 3),
        "requests_per_s": round(requests / wall_s),
        "decisions_per_s": round(decisions / max(sim.decision_s, 1e-9)),
        "us_per_decision": round(sim.decision_s / max(1, decisions) * 1e6, 1),
    }


def main() -> None:
    args = parse_args()
    result = run(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>16}  {value if isinstance(value, dict | float) else f'{value:,}'}")


if __name__ == "__main__":
    main()
