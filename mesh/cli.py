"""The `raymesh` command: starts a mesh and talks to one.

Rule of the file: words and exit codes only. What takes time to import (ray, grpc, numpy) is imported by the command
that needs it. With ``--json`` standard output holds JSON and nothing else; people's words go to standard error.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from raymesh.mesh.cli_input import (
    CliError,
    Datatype,
    as_uri,
    read_inputs,
    read_settings,
    read_size,
    read_specs,
    up_arguments,
)

if TYPE_CHECKING:
    from raymesh.mesh.client import Client, ModelStatus, VModelStatus

_EPILOG = (
    "Exit codes: 0 done; 1 the mesh said no; 2 wrong usage or input; 3 mesh or registry not reachable (try again); "
    "4 port taken; 5 a mesh is running in this state dir already; 6 the mesh did not become ready; 130 interrupted."
)

app = typer.Typer(
    name="raymesh",
    help="Thousands of models behind one endpoint, on Ray.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Protocol(enum.StrEnum):
    """How predictions travel."""

    GRPC = "grpc"
    REST = "rest"


Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing but JSON, on standard output.")]
Target = Annotated[str, typer.Option(envvar="RAYMESH_TARGET", help="The mesh, host:port.", show_default=True)]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds to wait for an answer.", min=0.001)]
Name = Annotated[str, typer.Argument(help="The model's name.", show_default=False)]
StateDirOption = Annotated[
    Path | None, typer.Option("--state-dir", help="Data, logs and sockets of the mesh [default: .raymesh].")
]

_DEFAULT_TARGET = "127.0.0.1:8033"


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit. No traceback reaches the user unless ``--debug`` was given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_json, is_debug = "--json" in arguments, "--debug" in arguments or bool(os.environ.get("RAYMESH_DEBUG"))
    try:
        exit_code = app(arguments, prog_name="raymesh", standalone_mode=False)
        sys.exit(exit_code if isinstance(exit_code, int) else 0)
    except CliError as error:
        _fail(error.exit_code, str(error), is_json, **error.fields)
    except (KeyboardInterrupt, typer.Abort):
        _fail(130, "interrupted", is_json)
    except BrokenPipeError:
        # Whoever read our output has seen enough, as in `raymesh list | head`; Python must not complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # wrong usage, found by typer
            _fail(int(error.exit_code), error.format_message() or "see raymesh --help", is_json)
        if is_debug:
            raise
        _fail(1, f"{type(error).__name__}: {error} (more with --debug)", is_json)


def _fail(exit_code: int, message: str, is_json: bool, **fields: Any) -> NoReturn:
    if is_json:
        print(json.dumps({"error": message, "exit_code": exit_code, **fields}))
    else:
        print(f"raymesh: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"raymesh {version('raymesh')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    logging.basicConfig(format="raymesh: %(message)s", level=logging.WARNING)
    logging.getLogger("raymesh").setLevel(logging.DEBUG if debug else logging.WARNING)


# ---- the mesh ---------------------------------------------------------------------------------------------------


@app.command()
def up(
    port: Annotated[int | None, typer.Option(help="Port for everything [default: 8033].", show_default=False)] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].", show_default=False)
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(help="etcd://host:port[,…] of your etcd [default: an embedded one].", show_default=False),
    ] = None,
    runtimes: Annotated[int | None, typer.Option(help="Runtime processes [default: one per core].", min=0)] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for all models, such as 2GiB [default: half of this machine's].")
    ] = None,
    state_dir: StateDirOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background; return when ready.")] = False,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Load pickled models, which may run any code.")
    ] = False,
    app_path: Annotated[str, typer.Option("--app", hidden=True)] = "raymesh.mesh.app:build",
    is_json: Json = False,
) -> None:
    """Start a mesh on this machine and stay until Ctrl-C or `raymesh down`.

    Every option can also be given as RAYMESH_<OPTION> in the environment.
    """
    from raymesh.mesh import launch
    from raymesh.mesh.state_dir import MeshRecord

    settings = read_settings(
        port=port,
        host=host,
        registry=registry,
        runtimes=runtimes,
        memory_bytes=None if memory is None else read_size(memory),
        state_dir=state_dir,
        trust_pickle=trust_pickle or None,
    )
    is_embedded = registry is None and "RAYMESH_REGISTRY" not in os.environ

    def tell(record: MeshRecord) -> None:
        if is_json:
            shown = {"endpoint": record.endpoint, "port": record.port, "registry": record.registry, "pid": record.pid}
            _print_json({"status": "ready", **shown, "state_dir": str(settings.state_dir)})
        else:
            print(
                f"raymesh is ready at {record.endpoint} (REST and gRPC), state in {settings.state_dir},"
                f" pid {record.pid}",
                flush=True,
            )

    try:
        if detach:
            arguments = up_arguments(settings, None if is_embedded else settings.registry)
            tell(launch.detach([*arguments, "--app", app_path], settings.state_dir))
            return
        launcher = launch.Launcher(settings, is_embedded=is_embedded, app=app_path)
        if not launcher.run(tell):
            raise CliError(
                launch.ExitCode.INTERRUPTED, "interrupted before the mesh was ready; nothing is left running"
            )
    except launch.LaunchError as error:
        raise CliError(error.exit_code, str(error)) from error


@app.command()
def down(state_dir: StateDirOption = None, is_json: Json = False) -> None:
    """Stop the mesh of a state dir; fine if there is none."""
    from raymesh.mesh import launch

    settings = read_settings(state_dir=state_dir)
    try:
        done = launch.down(settings)
    except launch.LaunchError as error:
        raise CliError(error.exit_code, str(error)) from error
    if is_json:
        _print_json({"stopped": done.pid != 0, "pid": done.pid, "leftovers": list(done.leftovers)})
        return
    print(f"stopped pid {done.pid}" if done.pid else f"no mesh is running in {settings.state_dir}")
    if done.leftovers:
        print(f"ended what was left behind: {', '.join(done.leftovers)}")


# ---- models -----------------------------------------------------------------------------------------------------


@app.command()
def register(
    name: Name,
    uri: Annotated[str, typer.Argument(help="Where the model is: file:///…, or a path on this machine.")],
    type: Annotated[str, typer.Option("--type", help="xgboost, sklearn, onnx, …")],
    key: Annotated[str, typer.Option(help="Parameters for the model's framework, a JSON object.")] = "",
    load: Annotated[bool, typer.Option("--load", help="Load it now and wait for that.")] = False,
    target: Target = _DEFAULT_TARGET,
    timeout_s: Timeout = 60.0,
    is_json: Json = False,
) -> None:
    """Register a model. It is loaded when it is first asked, or now with --load."""
    with _client(target, timeout_s) as client:
        status = client.register(name, as_uri(uri), type, key=key, load=load)
    _print_status(name, status, is_json)
    if status.status == "LOADING_FAILED":
        raise typer.Exit(1)


@app.command("register-many")
def register_many(
    file: Annotated[str, typer.Argument(help='Lines of {"name","uri","type","key"?}; - is standard input.')],
    concurrency: Annotated[int, typer.Option(help="Calls in flight, at most.", min=1, max=1024)] = 64,
    target: Target = _DEFAULT_TARGET,
    timeout_s: Timeout = 60.0,
    is_json: Json = False,
) -> None:
    """Register the models of a JSONL file."""
    import time

    specs = read_specs(file)
    with _client(target, timeout_s) as client, _progress(len(specs), is_shown=not is_json) as progress:
        started = time.perf_counter()
        summary = client.register_many(specs, concurrency=concurrency, progress=progress)
    seconds = time.perf_counter() - started
    per_s = round(summary.registered / seconds) if seconds else 0
    if is_json:
        failed = [{"name": name, "error": message} for name, message in summary.failed]
        _print_json({
            "registered": summary.registered, "failed": failed, "seconds": round(seconds, 3), "per_s": per_s,
        })  # fmt: skip
    else:
        print(f"registered {summary.registered} of {len(specs)} models in {seconds:.1f} s ({per_s}/s)")
        for name, message in summary.failed[:20]:
            print(f"  {name}: {message}", file=sys.stderr)
        if len(summary.failed) > 20:
            print(f"  and {len(summary.failed) - 20} more; all of them with --json", file=sys.stderr)
    if summary.failed:
        raise typer.Exit(1)


@app.command("list")
def list_models(target: Target = _DEFAULT_TARGET, timeout_s: Timeout = 60.0, is_json: Json = False) -> None:
    """List all models."""
    with _client(target, timeout_s) as client:
        models = client.list()
    if is_json:
        _print_json({"models": models})
        return
    from raymesh.mesh.config import format_size

    rows = [("NAME", "TYPE", "STATE", "SIZE", "INSTANCES")]
    for model in models:
        size_bytes = int(model.get("size_bytes") or 0)
        size = format_size(size_bytes) if size_bytes else "-"
        instances = ", ".join(map(str, model.get("instances") or ())) or "-"
        rows.append((str(model.get("name")), str(model.get("type")), str(model.get("state")), size, instances))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def status(name: Name, target: Target = _DEFAULT_TARGET, timeout_s: Timeout = 60.0, is_json: Json = False) -> None:
    """Show how a model is doing. Exit code 1 if there is no such model."""
    with _client(target, timeout_s) as client:
        found = client.status(name)
    _print_status(name, found, is_json)
    if found.status == "NOT_FOUND":
        raise typer.Exit(1)


@app.command()
def predict(
    name: Name,
    input: Annotated[
        str, typer.Option("--input", help='JSON file, - is standard input: {"inputs": […]} or a (nested) list.')
    ],
    datatype: Annotated[Datatype, typer.Option(help="What a plain list is sent as.")] = Datatype.FP32,
    protocol: Annotated[Protocol, typer.Option(help="How to ask.")] = Protocol.GRPC,
    target: Target = _DEFAULT_TARGET,
    timeout_s: Timeout = 60.0,
    is_json: Json = False,
) -> None:
    """Ask a model."""
    from raymesh.mesh import client_tensors

    inputs, outputs = read_inputs(input, datatype)
    with _client(target, timeout_s, protocol) as client:
        prediction = client.predict(name, inputs, outputs=outputs)
    if is_json:
        tensors = [
            {
                "name": output,
                "datatype": client_tensors.datatype_of(array),
                "shape": list(array.shape),
                "data": client_tensors.to_list(array),
            }
            for output, array in prediction.outputs.items()
        ]
        _print_json({"model_name": name, "id": prediction.id, "cold": prediction.cold, "outputs": tensors})
        return
    for output, array in prediction.outputs.items():
        print(f"{output}  {client_tensors.datatype_of(array)} {list(array.shape)}")
        print(array)


@app.command()
def unregister(name: Name, target: Target = _DEFAULT_TARGET, timeout_s: Timeout = 60.0, is_json: Json = False) -> None:
    """Forget a model; fine if there is none."""
    with _client(target, timeout_s) as client:
        client.unregister(name)
    if is_json:
        _print_json({"name": name, "unregistered": True})
    else:
        print(f"{name} is not registered any more")


# ---- vmodels ----------------------------------------------------------------------------------------------------

vmodel_app = typer.Typer(name="vmodel", help="Aliases that go over from one model to the next.", no_args_is_help=True)
app.add_typer(vmodel_app)

VModelName = Annotated[str, typer.Argument(help="The vmodel's name.", show_default=False)]
Owner = Annotated[str, typer.Option(help="Only if the vmodel is this owner's.", show_default=False)]


@vmodel_app.command("set")
def set_vmodel(
    name: VModelName,
    target_model: Annotated[str, typer.Argument(help="The model that is to answer.", show_default=False)],
    uri: Annotated[str, typer.Option(help="Register the target: where it is.", show_default=False)] = "",
    type: Annotated[str, typer.Option("--type", help="Register the target: xgboost, sklearn, onnx, …")] = "",
    key: Annotated[str, typer.Option(help="Register the target: parameters, a JSON object.")] = "",
    auto_delete: Annotated[
        bool, typer.Option("--auto-delete", help="Unregister the target when no vmodel uses it any more.")
    ] = False,
    load: Annotated[bool, typer.Option("--load", help="Load the target even if nobody uses the vmodel.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Go over now, loaded or not.")] = False,
    update_only: Annotated[bool, typer.Option("--update-only", help="Fail if there is no such vmodel.")] = False,
    expect: Annotated[str, typer.Option(help="Fail unless this is its target now.", show_default=False)] = "",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until the target has taken over.")] = False,
    owner: Owner = "",
    target: Target = _DEFAULT_TARGET,
    timeout_s: Timeout = 300.0,
    is_json: Json = False,
) -> None:
    """Create a vmodel, or have it go over to another model as soon as that is loaded."""
    from raymesh.mesh.client import ModelSpec

    if bool(uri) != bool(type):
        raise CliError(2, "--uri and --type go together: both to register the target, none if it is registered")
    with _client(target, timeout_s) as client:
        found = client.set_vmodel(
            name,
            ModelSpec(target_model, as_uri(uri), type, key) if uri else target_model,
            owner=owner,
            load=load,
            sync=not no_wait,
            update_only=update_only,
            force=force,
            auto_delete=auto_delete,
            expected_target=expect,
        )
    _print_vmodel(name, found, is_json)
    if found.status == "TRANSITION_FAILED":
        raise typer.Exit(1)


@vmodel_app.command("status")
def vmodel_status(
    name: VModelName,
    owner: Owner = "",
    target: Target = _DEFAULT_TARGET,
    timeout_s: Timeout = 60.0,
    is_json: Json = False,
) -> None:
    """Show which model answers for a vmodel, and which is to. Exit code 1 if there is no such vmodel."""
    with _client(target, timeout_s) as client:
        found = client.vmodel_status(name, owner=owner)
    _print_vmodel(name, found, is_json)
    if found.status == "NOT_FOUND":
        raise typer.Exit(1)


@vmodel_app.command("delete")
def delete_vmodel(
    name: VModelName,
    owner: Owner = "",
    target: Target = _DEFAULT_TARGET,
    timeout_s: Timeout = 60.0,
    is_json: Json = False,
) -> None:
    """Delete a vmodel and the models that were to go with it; fine if there is none, or if it is another owner's."""
    with _client(target, timeout_s) as client:
        client.delete_vmodel(name, owner=owner)
        is_left = bool(owner) and client.vmodel_status(name).status != "NOT_FOUND"
    if is_json:
        _print_json({"name": name, "deleted": not is_left})
    else:
        print(f"{name} is another owner's and stays" if is_left else f"there is no vmodel {name} any more")


# ---- talking ----------------------------------------------------------------------------------------------------


@contextmanager
def _client(target: str, timeout_s: float, protocol: str = "grpc") -> Iterator[Client]:
    # gRPC's C core reports on standard error what comes back as an error anyway.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from raymesh.mesh.client import Client, MeshError
    from raymesh.runtimes.errors import Code

    try:
        client = Client(target, protocol=protocol, timeout_s=timeout_s)
    except ValueError as error:
        raise CliError(2, f"--target: {error}") from None
    try:
        with client:
            yield client
    except MeshError as error:
        exit_code = 3 if error.code is Code.UNAVAILABLE else 1
        message = error.message or error.code.name
        raise CliError(exit_code, message, code=error.code.name, reason=error.reason) from error


@contextmanager
def _progress(total: int, *, is_shown: bool) -> Iterator[Any]:
    """A bar on standard error when that is a terminal; yields what to call with the number done."""
    if not (is_shown and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("registering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.update(task, completed=count)


def _print_vmodel(name: str, status: VModelStatus, is_json: bool) -> None:
    models = {"active": status.active_status, "target": status.target_status}
    if is_json:
        shown = {
            role: {"status": found.status, "errors": list(found.errors)} if found is not None else None
            for role, found in models.items()
        }
        _print_json({
            "name": name, "status": status.status, "owner": status.owner,
            "active": status.active, "target": status.target,
            "active_status": shown["active"], "target_status": shown["target"],
        })  # fmt: skip
        return
    print(f"{name}: {status.status}" + (f" (owner {status.owner})" if status.owner else ""))
    for role, model in (("active", status.active), ("target", status.target)):
        found = models[role]
        if model and found is not None:
            print(f"  {role} {model}: {found.status}")
            for error in found.errors:
                print(f"    error: {error}")


def _print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)


def _print_status(name: str, status: ModelStatus, is_json: bool) -> None:
    if is_json:
        copies = [{"instance": c.instance, "status": c.status, "time_ms": c.time_ms} for c in status.copies]
        _print_json({"name": name, "status": status.status, "errors": list(status.errors), "copies": copies})
        return
    print(f"{name}: {status.status}")
    for copy in status.copies:
        print(f"  {copy.status} on {copy.instance or 'no instance'}")
    for error in status.errors:
        print(f"  error: {error}")


if __name__ == "__main__":
    main()
