"""Golden conversations: `scenarios/*.txt` are commands and what the mesh did, in virtual time.

A scenario is blocks of commands, a line of four dashes, what happened, and an empty line; `#` begins a comment:

    instances N capacity=BYTES [slots=N]     register NAME size=BYTES [broken]     request NAME ...
    advance MS      lose INSTANCE      drain INSTANCE      faults NAME=PROBABILITY ...      show INSTANCE

`RAYMESH_REWRITE=1 pytest tests/sim` writes what happens now; read the diff, and commit it only if you can explain it.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import pytest

from raymesh.placement.simulation import Faults, Simulation, Timing

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


def perform(sim: Simulation, command: str, said: list[str]) -> None:
    verb, *words = command.split("#")[0].split()
    options = dict(word.split("=") for word in words if "=" in word)
    names = [word for word in words if "=" not in word]
    match verb:
        case "instances":
            for _ in range(int(names[0])):
                sim.add_instance(int(options["capacity"]), load_slots=int(options.get("slots", "1")))
        case "register":
            sim.register(names[0], int(options["size"]), is_broken="broken" in names)
        case "request":
            for name in names:
                sim.request(name)
        case "advance":
            sim.run_until(sim.now_ms + int(names[0]))
        case "lose":
            sim.lose(names[0])
        case "drain":
            sim.drain(names[0])
        case "faults":
            sim.faults = Faults(**{name: float(value) for name, value in options.items()})
        case "show":
            said.append(f"{'':>6} {names[0]} {sim.instances[names[0]].cache}")
        case _:
            raise ValueError(f"unknown command: {command}")


def play(text: str) -> str:
    """The scenario with what happens now in place of what is written."""
    said: list[str] = []
    timing = Timing(load=50, load_jitter=0.0, unload=5, watch_lag=20, lease=5_000)
    sim = Simulation(Random(1), timing=timing, transcript=said.append)
    blocks = []
    for block in text.strip().split("\n\n"):
        commands = block.split("\n----")[0]
        for line in commands.splitlines():
            if line.split("#")[0].strip():
                perform(sim, line, said)
        blocks.append("\n".join([commands, "----", *said]))
        said.clear()
    return "\n\n".join(blocks) + "\n"


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    expected = path.read_text()
    happened = play(expected)
    if os.environ.get("RAYMESH_REWRITE"):
        path.write_text(happened)
    else:
        assert happened == expected


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 5
