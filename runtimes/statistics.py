"""What one loaded model has done, in the numbers Triton's clients know.

Rule of the file: counted once per batch, never per row. Times are nanoseconds of a monotonic clock. As Triton counts
them: a request takes part in the whole of its batch's computing; queue and compute are of successful requests only, so
their counts are the same; a failure counts as a failure and nothing else.
"""

from __future__ import annotations

import time
from typing import Any


class Statistics:
    """Counters of one loaded model. Written by whichever thread computes it, one at a time."""

    __slots__ = (
        "compute_infer_ns",
        "compute_input_ns",
        "compute_output_ns",
        "executions",
        "failures",
        "failures_ns",
        "inferences",
        "last_inference_ms",
        "queue_ns",
        "refusals",
        "successes",
        "successes_ns",
    )

    def __init__(self) -> None:
        #: Requests answered, and their times from acceptance to answer.
        self.successes = 0
        self.successes_ns = 0
        self.failures = 0
        self.failures_ns = 0
        #: Requests that never came to a computation. Apart from `failures`, for another thread counts those.
        self.refusals = 0
        #: Rows answered, and calls of the model that took.
        self.inferences = 0
        self.executions = 0
        self.queue_ns = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0
        #: Wall-clock time of the last computation, in ms since the Unix epoch.
        self.last_inference_ms = 0

    def add_batch(
        self,
        *,
        requests: int,
        failed: int,
        rows: int,
        waited_ns: int,
        input_ns: int,
        infer_ns: int,
        output_ns: int,
    ) -> None:
        """One batch was computed: `requests` of `rows` in all, `failed` of them in vain.

        `waited_ns` is the sum over its requests of their times in the queue; the other times are the batch's.
        """
        self.executions += 1
        self.last_inference_ms = time.time_ns() // 1_000_000
        succeeded = requests - failed
        batch_ns = input_ns + infer_ns + output_ns
        if failed:
            # How long each of them waited is not worth knowing: they get the mean.
            own_ns = waited_ns * failed // requests
            waited_ns -= own_ns
            rows = rows * succeeded // requests
            self.failures += failed
            self.failures_ns += own_ns + failed * batch_ns
        self.successes += succeeded
        self.successes_ns += waited_ns + succeeded * batch_ns
        self.inferences += rows
        self.queue_ns += waited_ns
        self.compute_input_ns += succeeded * input_ns
        self.compute_infer_ns += succeeded * infer_ns
        self.compute_output_ns += succeeded * output_ns

    def as_json(self) -> dict[str, Any]:
        """``{"last_inference", "inference_count", "execution_count", "inference_stats"}`` of Triton's statistics."""
        count = self.successes

        def duration(count: int, ns: int) -> dict[str, int]:
            return {"count": count, "ns": ns}

        return {
            "last_inference": self.last_inference_ms,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {
                "success": duration(count, self.successes_ns),
                "fail": duration(self.failures + self.refusals, self.failures_ns),
                "queue": duration(count, self.queue_ns),
                "compute_input": duration(count, self.compute_input_ns),
                "compute_infer": duration(count, self.compute_infer_ns),
                "compute_output": duration(count, self.compute_output_ns),
                "cache_hit": duration(0, 0),
                "cache_miss": duration(0, 0),
            },
        }


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The statistics of two copies of one model as one: sums, and the later of the last inferences."""
    merged: dict[str, Any] = {}
    for key, value in first.items():
        other = second[key]
        if isinstance(value, dict):
            merged[key] = merge(value, other)
        else:
            merged[key] = max(value, other) if key == "last_inference" else value + other
    return merged
