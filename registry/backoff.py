"""Pauses between tries that grow and are jittered."""

from __future__ import annotations

import random


class Backoff:
    """25 to 50 ms at first, then doubling up to 0.5 to 1 s.

    Never under half of the limit, so that an outage costs next to no CPU; never in step with other clients.
    """

    def __init__(self) -> None:
        self._tries = 0

    def reset(self) -> None:
        """Something worked: begin small again."""
        self._tries = 0

    def next_s(self) -> float:
        """Seconds to pause before the next try."""
        limit_s = min(1.0, 0.05 * 2.0 ** min(self._tries, 10))
        self._tries += 1
        return limit_s * random.uniform(0.5, 1.0)
