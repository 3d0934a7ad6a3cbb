"""`ServeConfig`: which models a server has, on what, under which policy; from TOML or the shell.

An unknown field or a wrong value is an `InputError` that names it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from mmrl.errors import InputError, nearest
from mmrl.files import read_toml
from mmrl.node.state import MAX_MODELS
from mmrl.scenarios.targets import Targets

REMEDY = "docs/serving.md describes each field"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Strict):
    """A model to serve.

    Attributes:
        path: Folder of the checkpoint, or its id on a model hub.
        name: What clients call it; the last part of the path unless given.
        dtype: Of weights and KV cache; the checkpoint's unless given.
        targets: Latency targets; the node's unless given.
        batch: Batch work: a TTFT target of its own and no TPOT target.
        profile: Measured costs (a profile file); looked for in ``node.profiles`` unless given.
        max_context: Most tokens of prompt and output together; the model's unless given.
        pin: Keep it on the device once it is there.
        preload: Load it at start.
    """

    path: Annotated[str, Field(min_length=1)]
    name: str = ""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    targets: Targets | None = None
    batch: bool = False
    profile: Path | None = None
    max_context: Annotated[int, Field(ge=16)] | None = None
    pin: bool = False
    preload: bool = False

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"path": value}
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("path"), str):
            value = {**value, "name": Path(value["path"]).name}
        return value


class NodeConfig(_Strict):
    """The device and who decides.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        memory: Device memory for everything: weights, KV cache, workspace; all that is usable
            (on a CPU: half of what is available) unless given.
        host_kv: Host memory for the KV cache of suspended sequences.
        policy: ``default`` for the policy that is shipped, a rule's name, or the folder of a
            trained policy.
        verbs: ``core`` or ``full``; full unless given, but for a policy that knows core alone.
        targets: Latency targets of all models that have none of their own.
        dispatch: Who gets the device next: ``rr``, ``edf`` or ``las``; a policy that was made with
            one brings its own.
        decision_deadline: Seconds after which the champion decides in place of the policy.
        profiles: Folder of measured profiles, as ``mmrl profile run`` writes them; the user's own
            unless given. Models without one have costs that are derived from their shapes.
        measure: Measure models without a profile before serving, into that folder.
    """

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    memory: ByteSize | None = None
    host_kv: ByteSize = ByteSize(4 * 10**9)
    policy: str = "default"
    verbs: Literal["core", "full"] | None = None
    targets: Targets = Targets.model_validate("chat")
    dispatch: Literal["rr", "edf", "las"] = "rr"
    decision_deadline: Annotated[float, Field(gt=0)] = 0.05
    profiles: Path | None = None
    measure: bool = False


class ServerConfig(_Strict):
    """The HTTP front.

    Attributes:
        host: Address to listen on.
        port: Port; 0 for any that is free.
        api_keys: File with one key per line; the environment's MMRL_API_KEYS (commas between
            keys) counts too. Without any, everybody may ask.
        admin_keys: The same for operators (MMRL_ADMIN_KEYS); without any, the API keys open
            ``/admin`` too.
        max_request: Largest body of a request.
        drain_timeout: Seconds that running requests have to end after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: Path | None = None
    admin_keys: Path | None = None
    max_request: ByteSize = ByteSize(4 << 20)
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0


class ServeConfig(_Strict):
    """Everything about a server."""

    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1, max_length=MAX_MODELS)]
    node: NodeConfig = NodeConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _one_of_each(self) -> "ServeConfig":
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: two are called '{name}'; give one a name of its own")
        return self


def read_models(given: Sequence[str], where: str) -> ServeConfig:
    """Return the configuration that a command line names: one TOML file, or models.

    Args:
        given: The file alone, or checkpoints.
        where: The command, for errors.

    Raises:
        InputError: It cannot be read, a field is wrong, or a file stands where a model should.
    """
    if len(given) == 1 and given[0].endswith(".toml"):
        return read_config(Path(given[0]))
    for name in given:
        if name.endswith(".toml"):
            raise InputError(
                f"{where} takes one config file, or models", f"name the models in {name}"
            )
        if Path(name).is_file():
            raise InputError(f"{name}: not a folder", "name model folders, or one .toml file")
    return build_config({"models": [{"path": name} for name in given]}, where)


def read_config(path: Path) -> ServeConfig:
    """Read a TOML file; relative paths in it are relative to its folder.

    Raises:
        InputError: It cannot be read, or a field is wrong.
    """
    data = read_toml(path, "a config file or model folders")
    for model in data.get("models", []) if isinstance(data.get("models"), list) else []:
        _place(model, "path", path.parent, or_name=True)
        _place(model, "profile", path.parent)
    _place(data.get("node"), "policy", path.parent, or_name=True)
    _place(data.get("node"), "profiles", path.parent)
    _place(data.get("server"), "api_keys", path.parent)
    _place(data.get("server"), "admin_keys", path.parent)
    return build_config(data, str(path))


def build_config(data: dict[str, Any], where: str) -> ServeConfig:
    """Check what a user wrote.

    Raises:
        InputError: A field is unknown or wrong.
    """
    try:
        return ServeConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            fields = _fields(first["loc"])
            remedy = nearest(str(first["loc"][-1]), fields) or f"known: {', '.join(fields)}"
            raise InputError(f"{where}: {place}: no such field", remedy) from None
        if first["type"].startswith("byte_size"):
            raise InputError(
                f"{where}: {place}: '{first['input']}' is not a size", "for example 24GB"
            ) from None
        words = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{where}: {place}: {words}" if place else f"{where}: {words}", REMEDY
        ) from None


def _fields(place: Sequence[int | str]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "models": ModelConfig,
        "node": NodeConfig,
        "server": ServerConfig,
    }
    schema = sections.get(str(place[0]), ServeConfig) if len(place) > 1 else ServeConfig
    return list(schema.model_fields)


def _place(table: Any, field: str, folder: Path, or_name: bool = False) -> None:
    """Put a relative path below the config's folder; what may be a name, only if it is there."""
    if isinstance(table, dict) and isinstance(table.get(field), str):
        candidate = folder / table[field]
        if not or_name or candidate.exists():
            table[field] = str(candidate)
