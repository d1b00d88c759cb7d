"""How Ray is made to run light, quiet and alone inside `raymesh up`.

Rule of the file: no import of Ray at the top; what it reads from the environment must be there first.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from raymesh.mesh.config import Settings
from raymesh.mesh.state_dir import StateDir

_log = logging.getLogger(__name__)

#: Ray's shared memory store, which the mesh does not use; Ray takes no less than 75 MiB.
OBJECT_STORE_BYTES = 80 * 1024 * 1024

#: Defaults for what the user's environment does not say. Read by Ray when it is imported.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # No idle workers waiting for tasks: the mesh runs a handful of actors and nothing else.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_DEDUP_LOGS": "0",
    # Ray would run the processes that answer requests at the lowest priority but four.
    "RAY_worker_niceness": "0",
}


def prepare_environment(state: StateDir, settings: Settings) -> None:
    """Set what Ray reads when it is imported, leaving what the user set."""
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Someone else's cluster is not to be joined by accident.
    os.environ.pop("RAY_ADDRESS", None)
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and not os.environ.get("RAY_AUTH_TOKEN"):
        # A token of this mesh only. Without one Ray would put a token into the user's home, which from then on turns
        # authentication on for every other Ray of this user.
        state.secret("ray-token")
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(settings.state_dir / "ray-token"))


def quieten() -> None:
    """Keep what Ray's daemons say (for one, a false alarm at every stop) off standard output; their logs have it."""
    from ray._private import worker

    def note(message: dict[str, Any], *_args: object, **_options: object) -> None:
        _log.debug("ray: %s", " ".join(message.get("lines", ())))

    # Ray has no setting for this: its listener prints even without `log_to_driver`.
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = note  # type: ignore[assignment]


def remove_old_sessions(temp_dir: Path) -> None:
    """Keep the logs of the last run only."""
    sessions = sorted(path for path in temp_dir.glob("session_2*") if path.is_dir() and not path.is_symlink())
    for path in sessions[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def failure(status: Any) -> str:
    """Why Serve gave up, in one line: its messages carry whole tracebacks, which are in the logs."""
    messages = [d.message for d in status.deployments.values() if d.status != "HEALTHY" and d.message]
    lines = "\n".join(messages or [status.message or "no reason given"]).splitlines()
    errors = [line.strip() for line in lines if line and not line[0].isspace() and "Error" in line]
    return (errors or lines)[-1]
