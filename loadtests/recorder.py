"""What a load test saw: one row per request, cheap enough to take while measuring."""

from __future__ import annotations

import array
import dataclasses
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt


class Temperature(IntEnum):
    """Whether a request found its model loaded. The official clients do not show the header that says so."""

    WARM = 0
    COLD = 1
    UNKNOWN = 2


@dataclasses.dataclass(slots=True)
class Recorder:
    """The requests of one client process, in the order of their ends.

    `failures` and `wrong` keep the text of the first `TEXTS_MAX`; the counters count all.
    """

    TEXTS_MAX = 20

    at_s: array.array[float] = dataclasses.field(default_factory=lambda: array.array("d"))
    latency_ms: array.array[float] = dataclasses.field(default_factory=lambda: array.array("d"))
    temperature: array.array[int] = dataclasses.field(default_factory=lambda: array.array("b"))
    client: array.array[int] = dataclasses.field(default_factory=lambda: array.array("b"))
    failures: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    failures_count: int = 0
    wrong_count: int = 0

    def answered(self, at_s: float, latency_ms: float, temperature: Temperature, client: int) -> None:
        """An answer came. `at_s` is seconds since the traffic began; `client` numbers the kind of client."""
        self.at_s.append(at_s)
        self.latency_ms.append(latency_ms)
        self.temperature.append(temperature)
        self.client.append(client)

    def failed(self, text: str) -> None:
        """No answer came, or an error where there should have been none."""
        self.failures_count += 1
        if len(self.failures) < self.TEXTS_MAX:
            self.failures.append(text)

    def answered_wrong(self, text: str) -> None:
        """The answer, recorded with `answered` as well, is not the model's."""
        self.wrong_count += 1
        if len(self.wrong) < self.TEXTS_MAX:
            self.wrong.append(text)


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """The requests of all clients together, as columns."""

    at_s: npt.NDArray[np.float64]
    latency_ms: npt.NDArray[np.float64]
    temperature: npt.NDArray[np.int8]
    client: npt.NDArray[np.int8]
    failures: list[str]
    wrong: list[str]
    failures_count: int
    wrong_count: int

    @classmethod
    def of(cls, recorders: list[Recorder]) -> Requests:
        """All that several client processes recorded."""

        def column(name: str, dtype: Any) -> npt.NDArray[Any]:
            return np.concatenate([np.array(getattr(recorder, name), dtype) for recorder in recorders])

        return cls(
            column("at_s", np.float64),
            column("latency_ms", np.float64),
            column("temperature", np.int8),
            column("client", np.int8),
            [text for recorder in recorders for text in recorder.failures],
            [text for recorder in recorders for text in recorder.wrong],
            sum(recorder.failures_count for recorder in recorders),
            sum(recorder.wrong_count for recorder in recorders),
        )

    def latencies_ms(self, temperature: Temperature) -> npt.NDArray[np.float64]:
        """Latencies of the warm, or of the cold requests."""
        chosen: npt.NDArray[np.float64] = self.latency_ms[self.temperature == temperature]
        return chosen


def percentile(values: npt.NDArray[np.float64], percent: float) -> float:
    """A percentile, nan when there is nothing to take it of."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")
