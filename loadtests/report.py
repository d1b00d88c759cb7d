"""Results for people: the machine they were measured on, and latency over time as a picture."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

import numpy as np
import psutil

from recorder import Requests, Temperature, percentile
from workload import Change, ChangeKind


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Where something was measured, and how busy it was just before."""

    cpu: str
    cores: int
    memory_gib: float
    load_average: tuple[float, float, float]
    python: str

    @classmethod
    def here(cls) -> Machine:
        """This machine, now."""
        return cls(
            cpu_model(),
            len(os.sched_getaffinity(0)),
            round(psutil.virtual_memory().total / 1024**3, 1),
            os.getloadavg(),
            platform.python_version(),
        )

    def __str__(self) -> str:
        one, five, _ = self.load_average
        return (
            f"{self.cores} cores of {self.cpu}, {self.memory_gib} GiB, Python {self.python}, "
            f"load average before: {one:.2f} (1 min) {five:.2f} (5 min)"
        )


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


#: Paul Tol's colours for people of every kind of sight: warm is blue, cold is red, whatever the plot.
WARM_COLOUR, COLD_COLOUR, CHANGE_COLOUR = "#4477AA", "#EE6677", "#888888"
#: A scatter of more points than this is a blot, and slow to draw.
POINTS_MAX = 12_000


def draw_latency(requests: Requests, changes: list[Change], title: str, path: Path) -> None:
    """Writes a PNG: every request (or a fair sample) by time and latency, percentiles, the rate, and the changes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (latency, rate, churn) = pyplot.subplots(
        3, 1, sharex=True, figsize=(11, 7), height_ratios=(5, 1.3, 0.7), layout="constrained", dpi=130
    )
    end_s = float(requests.at_s.max())
    for temperature, label, colour in (
        (Temperature.WARM, "warm", WARM_COLOUR),
        (Temperature.COLD, "cold (waited for a load)", COLD_COLOUR),
    ):
        mask = requests.temperature == temperature
        at_s, latency_ms = requests.at_s[mask], requests.latency_ms[mask]
        if not len(at_s):
            continue
        # The sample is each kind's own: cold requests are few and must not drown.
        shown = np.random.default_rng(0).permutation(len(at_s))[:POINTS_MAX]
        p50, p99 = percentile(latency_ms, 50), percentile(latency_ms, 99)
        text = f"{label}: {len(at_s):,} requests, p50 {p50:.1f} ms, p99 {p99:.1f} ms"
        latency.scatter(at_s[shown], latency_ms[shown], s=4, alpha=0.25, color=colour, linewidths=0, rasterized=True)
        middle_s, medians_ms = running_percentile(at_s, latency_ms, 50, end_s)
        latency.plot(middle_s, medians_ms, color=colour, linewidth=2, label=text)
        _, tails_ms = running_percentile(at_s, latency_ms, 99, end_s)
        latency.plot(middle_s, tails_ms, color=colour, linewidth=1.2, linestyle="--")
    latency.plot([], [], color="black", linewidth=2, label="median of each second")
    latency.plot([], [], color="black", linewidth=1.2, linestyle="--", label="p99 of each second")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    latency.set_ylabel("latency (ms)")
    latency.grid(alpha=0.25, which="major")
    legend = latency.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=2, frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        handle.set_alpha(1)

    edges_s = np.arange(0, np.ceil(end_s) + 1)
    counts = [np.histogram(requests.at_s[requests.temperature == t], edges_s)[0] for t in Temperature]
    middles_s = edges_s[:-1] + 0.5
    rate.bar(middles_s, counts[0] + counts[2], width=1.0, color=WARM_COLOUR)
    rate.bar(middles_s, counts[1], width=1.0, color=COLD_COLOUR, bottom=counts[0] + counts[2])
    rate.set_ylabel("requests/s")
    rate.grid(alpha=0.25, axis="y")

    kinds = list(ChangeKind)
    churn.scatter(
        [change.at_s for change in changes],
        [kinds.index(change.kind) for change in changes],
        marker="|",
        s=60,
        color=CHANGE_COLOUR,
    )
    churn.set_yticks(range(len(kinds)), [f"{kind}" for kind in kinds])
    churn.set_ylim(len(kinds) - 0.5, -0.5)
    churn.set_xlabel("seconds of traffic (marks: customers added, retrained, removed)")
    churn.set_xlim(0, end_s)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def running_percentile(
    at_s: np.ndarray, latency_ms: np.ndarray, percent: float, end_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """One percentile for each second; the middles of the seconds and the values, nan where nothing happened."""
    seconds = int(np.ceil(end_s)) or 1
    middles_s = np.arange(seconds) + 0.5
    values = [percentile(latency_ms[(at_s >= second) & (at_s < second + 1)], percent) for second in range(seconds)]
    return middles_s, np.array(values)
