"""Runs `h2load`, the load generator of nghttp2, and reads what it prints."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

HOW_TO_INSTALL = "h2load is not installed: apt-get install nghttp2-client (Debian, Ubuntu), brew install nghttp2"


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """One run: the rate, and what came back. `data_bytes` are bytes of bodies."""

    requests: int
    requests_per_s: float
    status_2xx: int
    data_bytes: int
    mean_ms: float

    def check(self, answer_bytes: int) -> None:
        """Raises `ValueError` unless every request got a 2xx answer whose body has `answer_bytes`.

        gRPC's errors are 200 as well, without a body; that is what the second half is for.
        """
        if self.status_2xx != self.requests:
            raise ValueError(f"only {self.status_2xx} of {self.requests} answers were 2xx")
        if self.data_bytes != self.requests * answer_bytes:
            raise ValueError(
                f"{self.requests} answers of {answer_bytes} bytes were expected, {self.data_bytes} bytes came"
            )


def is_installed() -> bool:
    """Whether there is an h2load on the PATH."""
    return shutil.which("h2load") is not None


def run_h2load(
    url: str, body: Path, requests: int, *, clients: int, streams: int = 1, headers: dict[str, str], is_http1: bool
) -> Load:
    """Posts the body `requests` times over `clients` connections with `streams` requests in flight on each."""
    command = ["h2load", "-n", str(requests), "-c", str(clients), "-t", "1", "-d", str(body)]
    command += ["--h1"] if is_http1 else ["-m", str(streams)]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"h2load failed: {done.stderr or done.stdout}")
    return read_output(done.stdout)


def read_output(text: str) -> Load:
    """The numbers in what h2load printed; raises `ValueError` when they are not there."""
    rate = re.search(r"finished in [\d.]+m?s, ([\d.]+) req/s", text)
    requests = re.search(r"requests: (\d+) total", text)
    status = re.search(r"status codes: (\d+) 2xx", text)
    data = re.search(r"\((\d+)\) data", text)
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+([\d.]+)(us|ms|s)\b", text)
    if not (rate and requests and status and data and mean):
        raise ValueError(f"cannot read the output of h2load:\n{text}")
    unit_ms = {"us": 1e-3, "ms": 1.0, "s": 1e3}[mean[2]]
    return Load(int(requests[1]), float(rate[1]), int(status[1]), int(data[1]), float(mean[1]) * unit_ms)
