"""Finding the one model file in what a user registered, and reading it.

Rule of the file: messages tell the user which formats are accepted and never say where on the server anything lies.
"""

from __future__ import annotations

from pathlib import Path

from raymesh.runtimes.errors import LoadFailed

#: Files that model repositories of other servers keep beside the model; they are no models.
_SIDE_FILES = frozenset({"model-settings.json", "settings.json", "config.pbtxt", "readme.md", "mlmodel"})


def find_model_file(path: Path, suffixes: tuple[str, ...], what: str) -> Path:
    """The model file at `path`: itself, or the only file with one of `suffixes` in the folder `path`.

    A file is taken whatever its suffix (its content decides). `what` names the format in messages, for example
    ``an XGBoost model``. Raises `LoadFailed` when there is none, more than one, or the file is empty.
    """
    accepted = ", ".join(suffixes)
    try:
        if path.is_dir():
            found = sorted(
                entry
                for entry in path.iterdir()
                if entry.suffix.lower() in suffixes
                and entry.name.lower() not in _SIDE_FILES
                and not entry.name.startswith(".")
                and entry.is_file()
            )
            if len(found) != 1:
                names = ", ".join(f"'{entry.name}'" for entry in found[:5]) or "none"
                raise LoadFailed(
                    f"the folder must hold exactly one file of {what} ({accepted}); it holds {len(found)}: {names}"
                )
            path = found[0]
        if path.stat().st_size == 0:
            raise LoadFailed(f"the file is empty; expected {what} ({accepted})")
    except OSError as error:
        raise LoadFailed(f"cannot read the model: {error.strerror or 'unreadable'}") from None
    return path


def read_model_file(path: Path) -> bytes:
    """The bytes of `path`; raises `LoadFailed` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise LoadFailed(f"cannot read the model: {error.strerror or 'unreadable'}") from None
