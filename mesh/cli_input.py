"""What the user of the `raymesh` command gave, read and checked: settings, JSONL files, inputs.

Rule of the file: wrong input ends in a `CliError` that says where it is and what would be right.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymesh.mesh.client_calls import ModelSpec
    from raymesh.mesh.config import Settings


class CliError(Exception):
    """Ends the command with a message and an exit code."""

    def __init__(self, exit_code: int, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.fields = fields


class Datatype(enum.StrEnum):
    """What a plain list of numbers is sent as."""

    FP32 = "FP32"
    FP64 = "FP64"
    INT64 = "INT64"


def read_settings(**overrides: Any) -> Settings:
    """The settings of a mesh from the environment and the options that were given (those that are not None)."""
    from raymesh.mesh.config import Settings

    try:
        given = {name: value for name, value in overrides.items() if value is not None}
        return Settings.from_env(**given).resolved()
    except ValueError as error:
        raise CliError(2, str(error)) from None


def read_size(text: str) -> int:
    """The bytes that ``--memory`` means."""
    from raymesh.mesh.config import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise CliError(2, f"--memory: {error}") from None


def up_arguments(settings: Settings, registry: str | None) -> list[str]:
    """The options of `raymesh up` that mean `settings`; what has no option comes from the inherited environment."""
    arguments = [
        *("--host", settings.host, "--port", str(settings.port), "--state-dir", str(settings.state_dir)),
        *("--runtimes", str(settings.runtimes), "--memory", str(settings.memory_bytes)),
    ]
    if registry is not None:
        arguments += ["--registry", registry]
    return arguments + (["--trust-pickle"] if settings.trust_pickle else [])


def as_uri(text: str) -> str:
    """`text`, or the URI of the local path it is; a mesh on another machine could make nothing of a relative path."""
    if "://" in text or not text:
        return text
    return Path(os.path.abspath(Path(text).expanduser())).as_uri()  # noqa: PTH100


def _read_text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CliError(2, f"{file}: {reason}") from None


def read_specs(file: str) -> list[ModelSpec]:
    """The models of a JSONL file. Ends with a message that names the line when one is wrong; nothing is sent then."""
    from raymesh.mesh.client_calls import ModelSpec

    specs = []
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("not a JSON object")
            missing = [name for name in ("name", "uri", "type") if not fields.get(name)]
            unknown = sorted(fields.keys() - {"name", "uri", "type", "key"})
            if missing or unknown:
                raise ValueError(f"missing {', '.join(missing)}" if missing else f"unknown field {', '.join(unknown)}")
            key = fields.get("key") or ""
            if not isinstance(key, str):
                key = json.dumps(key)
            specs.append(ModelSpec(str(fields["name"]), as_uri(str(fields["uri"])), str(fields["type"]), key))
        except ValueError as error:
            raise CliError(2, f"{file}, line {number}: {error}") from None
    return specs


def read_inputs(file: str, datatype: Datatype) -> tuple[Any, list[str]]:
    """Arrays by name (or one array) and the outputs asked for."""
    import numpy as np

    from raymesh.mesh import client_tensors

    try:
        value = json.loads(_read_text(file))
        if isinstance(value, list):
            return client_tensors.from_list("input", datatype, np.shape(value), value), []
        if not isinstance(value, dict) or not isinstance(value.get("inputs"), list):
            raise ValueError('write {"inputs": [{"name", "shape", "datatype", "data"}, …]} or a list of numbers')
        inputs = {
            tensor["name"]: client_tensors.from_list(
                tensor["name"], tensor["datatype"], tensor["shape"], tensor["data"]
            )
            for tensor in value["inputs"]
        }
        return inputs, [output["name"] for output in value.get("outputs") or ()]
    except KeyError as error:
        raise CliError(2, f"{file}: an input lacks {error}") from None
    except (TypeError, AttributeError):
        raise CliError(2, f"{file}: every input is an object with name, shape, datatype and data") from None
    except ValueError as error:
        raise CliError(2, f"{file}: {error}") from None
