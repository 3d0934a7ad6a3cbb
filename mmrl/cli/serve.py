"""`mmrl serve`: several models on one device behind an OpenAI-compatible server."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mmrl.deploy.config import ServeConfig

KEYS_VARIABLE = "MMRL_API_KEYS"


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
        typer.Option(help="Who decides: a rule's name, or the folder of a trained policy."),
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
    from mmrl.deploy.config import build_config, read_config

    if len(models) == 1 and models[0].endswith(".toml"):
        config = read_config(Path(models[0]))
        data = config.model_dump(mode="json", exclude_defaults=True)
        data["models"] = [
            model.model_dump(mode="json", exclude_none=True) for model in config.models
        ]
    else:
        data = {"models": [{"path": model} for model in models]}
    given: dict[str, dict[str, Any]] = {
        "node": {
            "policy": policy,
            "memory": memory,
            "host_kv": host_kv,
            "device": device,
            "measure": measure or None,
        },
        "server": {
            "host": host,
            "port": port,
            "api_keys": None if api_keys is None else str(api_keys),
        },
    }
    for section, values in given.items():
        data[section] = {
            **data.get(section, {}),
            **{field: value for field, value in values.items() if value is not None},
        }
    for name in preload or []:
        for model in data["models"]:
            if name in (model.get("name"), Path(model["path"]).name):
                model["preload"] = True
                break
        else:
            from mmrl.errors import unknown

            known = [model.get("name") or Path(model["path"]).name for model in data["models"]]
            raise unknown("model in --preload:", name, known)
    config = build_config(data, models[0] if models[0].endswith(".toml") else "mmrl serve")
    if config.node.measure:
        from mmrl.cli.profile_run import bars
        from mmrl.deploy.profiler.serving import measure_first

        measure_first(config, bars)
    asyncio.run(_serve(config))


async def _serve(config: "ServeConfig") -> None:
    """Start the engine, serve until a signal comes, drain, and stop."""
    import os
    import signal

    import uvicorn
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from mmrl.deploy.process import EngineClient
    from mmrl.deploy.server import (
        ServerSettings,
        configure_logs,
        create_app,
        read_keys,
        stop_streams,
    )

    console = Console(stderr=True)
    keys = read_keys(config.server.api_keys, os.environ)
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

    configure_logs()
    console.print("starting the engine (the first time, code is compiled: up to a minute)")
    engine = EngineClient(config, progress)
    try:
        with bars:
            await engine.start()
        for note in engine.notes:
            console.print(note, highlight=False)
        settings = ServerSettings(api_keys=keys, max_request_bytes=int(config.server.max_request))
        app = create_app(engine, settings)
        server = _server(uvicorn, app, config)
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        running = asyncio.create_task(server.serve())
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if server.started:
            address = server.servers[0].sockets[0].getsockname()
            console.print(
                f"serving {', '.join(engine.models)} at http://{address[0]}:{address[1]}",
                highlight=False,
            )
            waiting = asyncio.create_task(stopping.wait())
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            console.print("draining: running requests may end, new ones are refused")
            await engine.drain(config.server.drain_timeout)
            stop_streams(app)
            server.should_exit = True
        await running
    finally:
        await engine.stop()


def _server(uvicorn: Any, app: Any, config: "ServeConfig") -> Any:
    """Return a uvicorn server that leaves signals to us."""

    class Server(uvicorn.Server):  # type: ignore[misc]
        def capture_signals(self) -> Any:
            import contextlib

            return contextlib.nullcontext()

    return Server(
        uvicorn.Config(
            app,
            host=config.server.host,
            port=config.server.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )
