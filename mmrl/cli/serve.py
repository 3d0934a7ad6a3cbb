"""`mmrl serve`: several models on one device behind an OpenAI-compatible server."""

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mmrl.errors import InputError, unknown

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mmrl.deploy.config import ServeConfig, ServerConfig
    from mmrl.deploy.process import EngineClient

    Signals = asyncio.Queue[None]

KEYS_VARIABLE = "MMRL_API_KEYS"
ADMIN_KEYS_VARIABLE = "MMRL_ADMIN_KEYS"


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="One CONFIG.toml, or the checkpoints to serve: folders, or ids on a model hub.",
            metavar="CONFIG.toml | MODEL...",
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            help="Who decides: a rule's name, or the folder of a trained policy; "
            "the shipped policy unless given."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Device memory for weights, KV cache and workspace, as in 24GB."),
    ] = None,
    host_kv: Annotated[
        str | None, typer.Option(help="Host memory for the KV cache of suspended sequences.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 for any that is free.")] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help=f"File with one key per line; {KEYS_VARIABLE} in the environment counts too."
        ),
    ] = None,
    preload: Annotated[
        list[str] | None, typer.Option(help="Model to load at start; may be given several times.")
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="First measure models that have no profile: minutes for each.")
    ] = False,
) -> None:
    """Serve several models on one device.

    Every model stays in host memory; a policy decides which are on the device, wholly or in part,
    and who is preempted for whom. The live page is at /, the API at /v1, metrics at /metrics.

    mmrl testbed create llama-tiny --out models   makes a model to try it with.
    """
    options: dict[str, dict[str, Any]] = {
        "node": {
            "policy": policy,
            "memory": memory,
            "host_kv": host_kv,
            "device": device,
            "measure": measure or None,
        },
        "server": {"host": host, "port": port, "api_keys": api_keys and str(api_keys)},
    }
    config = _config(models, options, preload or [])
    if config.node.measure:
        from mmrl.cli.profile_run import bars
        from mmrl.deploy.profiler.serving import measure_first

        measure_first(config, bars)
    asyncio.run(_serve(config))


def _config(
    models: list[str], options: dict[str, dict[str, Any]], preload: list[str]
) -> "ServeConfig":
    """Return the configuration of a file or of models; options go before what a file says.

    Raises:
        InputError: It is wrong.
    """
    from mmrl.deploy.config import build_config, read_models

    config = read_models(models, "mmrl serve")
    data = config.model_dump(mode="json", exclude_defaults=True)
    data["models"] = [one.model_dump(mode="json", exclude_none=True) for one in config.models]
    for section, values in options.items():
        given = {field: value for field, value in values.items() if value is not None}
        data[section] = {**data.get(section, {}), **given}
    named = {model["name"]: model for model in data["models"]}
    for name in preload:
        if name not in named:
            raise unknown("model in --preload:", name, named)
        named[name]["preload"] = True
    return build_config(data, "mmrl serve")


async def _serve(config: "ServeConfig") -> None:
    """Start the engine and serve until a signal comes.

    What a person reads goes to stdout, the logs to stderr.
    """
    from mmrl.deploy.logs import configure_logs
    from mmrl.deploy.process import EngineClient
    from mmrl.deploy.server import ServerSettings, create_app, read_keys

    settings = ServerSettings(
        api_keys=read_keys(config.server.api_keys, os.environ.get(KEYS_VARIABLE, "")),
        admin_keys=read_keys(config.server.admin_keys, os.environ.get(ADMIN_KEYS_VARIABLE, "")),
        max_request_bytes=int(config.server.max_request),
        host=config.server.host,
    )
    _check_address(config.server)
    configure_logs()
    signals: Signals = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, None)
    console = Console(highlight=False, soft_wrap=True)
    console.print("starting the engine (the first time, code is compiled: a minute or two)")
    bars, progress = _bars(console)
    engine = EngineClient(config, progress)
    try:
        with bars:
            started = await _unless_told(engine.start(), signals)
        if started:
            for note in engine.notes:
                console.print(note)
            app = create_app(engine, settings)
            await _answer(config.server, engine, app, signals, console)
    finally:
        await engine.stop()


async def _answer(
    config: "ServerConfig",
    engine: "EngineClient",
    app: "FastAPI",
    signals: "Signals",
    console: Console,
) -> None:
    """Answer requests until a signal comes, then drain; a second signal ends the drain."""
    from mmrl.deploy.server import stop_streams

    server = _server(app, config)
    running = asyncio.create_task(server.serve())
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if server.started:
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        console.print(f"serving {', '.join(engine.models)} at http://{host}:{port}")
        await _unless_told(asyncio.shield(running), signals)
        console.print("draining: running requests may end, new ones are refused")
        await _unless_told(engine.drain(config.drain_timeout), signals)
        engine.hand_back()
        stop_streams(app)
        server.should_exit = True
    await running


async def _unless_told(work: Awaitable[object], signals: "Signals") -> bool:
    """Wait for some work; give it up and return False where a signal comes first."""
    task = asyncio.ensure_future(work)
    told = asyncio.create_task(signals.get())
    try:
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task  # raises what it raised
        return task.done()
    finally:
        for each in (task, told):
            each.cancel()
        await asyncio.gather(task, told, return_exceptions=True)


def _check_address(config: "ServerConfig") -> None:
    """Refuse an address that cannot be listened on, before minutes go by.

    Raises:
        InputError: It is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot listen on {config.host} port {config.port}: {reason}",
            "choose another --port or --host",
        ) from None


def _bars(console: Console) -> tuple[Progress, Callable[[str, int, int], None]]:
    """Return the bars of the weights that are read, and what moves them."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    )
    tasks: dict[str, Any] = {}

    def progress(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(f"reading {name}", total=total)
        bars.update(tasks[name], completed=done)

    return bars, progress


def _server(app: "FastAPI", config: "ServerConfig") -> Any:
    """Return a uvicorn server that leaves signals to us."""
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return nullcontext()

    return Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )
