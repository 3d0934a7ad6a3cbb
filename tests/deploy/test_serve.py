"""`mmrl serve` as a user runs it: real models, the real engine process, clients over HTTP."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from typer.testing import CliRunner

from mmrl.agents.export import DESCRIPTION
from mmrl.cli.app import app
from mmrl.deploy.adapter import FALLBACKS
from mmrl.deploy.config import build_config
from mmrl.deploy.fleet import Fleet, find_policy, open_fleet
from mmrl.deploy.testbed import create
from mmrl.errors import InputError, MmrlError

MODELS = {"alpha": "llama-tiny", "beta": "qwen2.5-tiny", "gamma": "gemma2-tiny"}


class Served:
    """A running `mmrl serve`."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("mmrl"), "serve", str(config)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            )
        self.url = ""
        until = time.monotonic() + 240
        while not self.url:
            found = re.search(r"at (http://\S+)", log.read_text())
            self.url = found.group(1) if found else ""
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        self.http = httpx2.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def state(self) -> dict[str, Any]:
        result: dict[str, Any] = self.http.get("/admin/state").json()
        return result

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve")
    lines = []
    for name, model in MODELS.items():
        create(model, folder, name=name)
        lines.append(f'[[models]]\npath = "{name}"')
    # Room for two of the three models beside what is reserved; time to think on a busy machine.
    lines.append('[node]\ndevice = "cpu"\nmemory = "146MB"\nhost_kv = "16MB"')
    lines.append("decision_deadline = 10")
    lines.append("[server]\nport = 0\ndrain_timeout = 20")
    config = folder / "node.toml"
    config.write_text("\n".join(lines))
    server = Served(config, folder / "log.txt")
    yield server
    server.close()


def wait(condition: Any, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "not in time"
        time.sleep(0.05)


def test_all_models_answer_on_a_device_that_does_not_hold_them(served: Served) -> None:
    answers = {}
    for name in MODELS:
        answer = served.client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            seed=5,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 12
        answers[name] = answer.choices[0].message.content
    state = served.state()
    assert {model["name"] for model in state["models"]} == set(MODELS)
    assert state["policy"] == "default"  # the shipped one, as no other is named
    for name in MODELS:  # the same seed, after the others had the device
        chunks = served.client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            seed=5,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == answers[name]


def test_many_clients_at_once(served: Served) -> None:
    async def all_of_them() -> list[int]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as client:

            async def one(i: int) -> int:
                answer = await client.completions.create(
                    model=list(MODELS)[i % 3],
                    prompt=[10 + i] * (5 + i),
                    max_tokens=5 + i % 20,
                    extra_body={"ignore_eos": True},
                )
                assert answer.usage is not None
                return answer.usage.completion_tokens

            return await asyncio.gather(*(one(i) for i in range(40)))

    assert asyncio.run(all_of_them()) == [5 + i % 20 for i in range(40)]
    state = served.state()
    assert sum(model["loads"] for model in state["models"]) >= 3
    assert state["decisions"] and all(decision["reason"] for decision in state["decisions"])
    assert state["fallbacks"] == dict.fromkeys(FALLBACKS, 0)


def test_a_disconnect_frees_the_kv_cache_at_once(served: Served) -> None:
    body = {"model": "alpha", "prompt": [20] * 100, "max_tokens": 1900, "ignore_eos": True}
    with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()  # kept: the connection is closed with it
        next(lines)
        wait(lambda: sum(model["kv_bytes"] for model in served.state()["models"]) > 0)
    wait(lambda: sum(model["running"] for model in served.state()["models"]) == 0)
    wait(lambda: sum(model["kv_bytes"] for model in served.state()["models"]) == 0)


def test_overload_answers_every_request(served: Served) -> None:
    """More than queues hold: everybody gets an answer, some of them 429 with Retry-After."""

    async def flood() -> list[tuple[int, str]]:
        limits = httpx2.Limits(max_connections=1000)
        async with httpx2.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:

            async def one(i: int) -> tuple[int, str]:
                body = {"model": "beta", "prompt": [30], "max_tokens": 2, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body)
                return answer.status_code, answer.headers.get("retry-after", "")

            return await asyncio.gather(*(one(i) for i in range(450)))

    answers = asyncio.run(flood())
    counts = {status: sum(s == status for s, _ in answers) for status, _ in answers}
    assert set(counts) <= {200, 429} and counts[200] >= 256
    assert all(retry for status, retry in answers if status == 429)


def test_operators_revert_and_pin(served: Served) -> None:
    assert served.http.post("/admin/preload/alpha").status_code == 200
    assert served.http.post("/admin/pin/alpha").status_code == 200
    wait(lambda: next(m for m in served.state()["models"] if m["name"] == "alpha")["pinned"])
    assert served.http.post("/admin/unpin/alpha").status_code == 200
    assert served.http.post("/admin/revert").status_code == 200
    wait(lambda: served.state()["reverted"])
    assert served.http.post("/admin/restore").status_code == 200
    wait(lambda: not served.state()["reverted"])


def test_an_operator_lets_another_policy_decide(served: Served, tmp_path: Path) -> None:
    for name in ("nobody", 300 * "a", "%00"):  # the last two cannot be looked for
        refused = served.http.post(f"/admin/policy/{name}")
        assert refused.status_code == 409 and "neither a rule nor" in refused.text
    os.mkfifo(tmp_path / DESCRIPTION)  # reading it never ends, and holds up nothing
    with pytest.raises(httpx2.TimeoutException):
        served.http.post(f"/admin/policy/{tmp_path}", timeout=0.5)
    assert served.http.post("/admin/policy/lru").json() == {"policy": "lru"}
    wait(lambda: served.state()["policy"] == "lru")
    answer = served.client.completions.create(model="beta", prompt="go on", max_tokens=4)
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_killed_engine_is_started_again(served: Served) -> None:
    children = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(served.process.pid)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pids = [
        int(line.split()[0]) for line in children.splitlines() if "multiprocessing.spawn" in line
    ]
    assert pids, children
    assert served.http.post("/admin/pin/alpha").status_code == 200
    assert served.http.post("/admin/revert").status_code == 200
    body = {"model": "alpha", "prompt": [20] * 50, "max_tokens": 1900, "ignore_eos": True}
    with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(max(pids), signal.SIGKILL)
        rest = [line for line in lines if line]
    assert any("engine died" in line for line in rest), rest[-3:]
    assert rest[-1] == "data: [DONE]"
    refused = served.http.post("/v1/completions", json=body)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    wait(lambda: served.http.get("/readyz").status_code == 200, 120)
    answer = served.client.completions.create(model="alpha", prompt="again", max_tokens=4)
    assert answer.choices[0].finish_reason in ("length", "stop")
    state = served.state()  # as operators had it before
    assert state["reverted"] and [m["name"] for m in state["models"] if m["pinned"]] == ["alpha"]
    assert served.http.post("/admin/unpin/alpha").status_code == 200
    assert served.http.post("/admin/restore").json() == {"policy": "lru"}


def test_sigterm_drains_and_exits_cleanly(served: Served) -> None:
    """The last test of this server: what runs ends, what comes is refused, the exit code is 0."""
    body = {"model": "alpha", "prompt": [20] * 5, "max_tokens": 150, "ignore_eos": True}
    with served.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        wait(lambda: "draining" in served.log.read_text())
        with httpx2.Client(base_url=served.url) as other:
            assert other.post("/v1/completions", json=body).status_code == 503
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert served.process.wait(timeout=60) == 0


def run(*arguments: str) -> tuple[int, str]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        result = CliRunner().invoke(app, ["serve", "--port", "0", *arguments])
    finally:  # the logs went to a stream that is closed now
        root.handlers[:] = handlers
        root.setLevel(level)
    if isinstance(result.exception, MmrlError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    """What only the engine's process can find out reaches the user all the same."""
    code, output = run(str(tmp_path / "none"))
    assert code == 2 and "none" in output and "Traceback" not in output


def test_an_address_in_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = run(str(tmp_path / "none"), "--port", str(taken.getsockname()[1]))
    assert code == 2 and "in use" in output and "--port" in output


def test_a_file_in_place_of_a_model_is_told_before_an_address_in_use(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = run(str(tmp_path / "README.md"), "--port", str(taken.getsockname()[1]))
    assert code == 2 and "README.md: not a folder" in output


def test_wrong_options_are_told_in_one_line(tmp_path: Path) -> None:
    for words, arguments in (
        ("two are called", ["a", "a"]),
        ("node.device", ["a", "--device", "tpu"]),
        ("unknown model in --preload", ["a", "--preload", "c"]),
        ("node.memory: 'much' is not a size (for example 24GB)", ["a", "--memory", "much"]),
        ("one config file, or models (name the models in b.toml)", ["a", "b.toml"]),
    ):
        code, output = run(*arguments)
        assert code == 2 and words in output, output


def test_a_fleet_that_cannot_be_served_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = str(create("llama-tiny", tmp_path, name="a"))
    for words, node in (
        ("node.memory: 100000.0 GB", {"memory": "100000GB"}),
        ("node.policy: 'nobody'", {"policy": "nobody"}),
        ("a can never run", {"memory": "2MB"}),
        ("of host memory", {"host_kv": "100000GB"}),
        ("node.device: 'cuda'", {"device": "cuda"}),
    ):
        if "cuda" in words and torch.cuda.is_available():
            continue
        config = build_config({"models": [path], "node": {"device": "cpu", **node}}, "test")
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            open_fleet(config)
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("node", "name", "full_verbs"),
    [
        ({}, "default", True),
        ({"verbs": "core"}, "default", False),
        ({"policy": "lru"}, "lru", True),
    ],
)
def test_the_shipped_policy_decides_unless_another_is_named(
    node: dict[str, str], name: str, full_verbs: bool, tmp_path: Path
) -> None:
    path = str(create("llama-tiny", tmp_path, name="a"))
    node = {"device": "cpu", "memory": "160MB", "host_kv": "1MB", **node}
    fleet = open_fleet(build_config({"models": [path], "node": node}, "test"))
    assert fleet.engine.adapter.name == name
    assert fleet.engine.node.state.full_verbs == full_verbs
    fleet.engine.close()
    fleet.close()


def test_a_policy_that_cannot_be_read_is_refused_by_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"^node\.policy: 'slak' .*did you mean 'slack'"):
        find_policy("slak")
    with pytest.raises(InputError, match=r"^node\.policy: cannot read .*or name a rule"):
        find_policy(str(tmp_path))
    monkeypatch.setattr("mmrl.agents.export.DEFAULT_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"^node\.policy: no default policy .*or name a rule"):
        find_policy("default")


def test_a_model_larger_than_host_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(create("llama-tiny", tmp_path, name="a"))
    config = build_config({"models": [path], "node": {"device": "cpu", "host_kv": 0}}, "test")
    monkeypatch.setattr("mmrl.deploy.fleet.host_available_bytes", lambda: 2_000_000)
    read: list[int] = []
    with pytest.raises(InputError, match=r"a alone 2\.5 MB\), but 2\.0 MB are available"):
        open_fleet(config, lambda name, done, total: read.append(done))
    assert not read


def test_a_model_that_cannot_be_loaded_at_start_is_named(tmp_path: Path) -> None:
    paths = [str(create("llama-tiny", tmp_path, name=name)) for name in ("a", "b")]
    models = [{"path": path, "preload": True, "pin": True} for path in paths]

    def start(nbytes: int) -> Fleet:
        node = {"device": "cpu", "memory": nbytes, "host_kv": 0}
        return open_fleet(build_config({"models": models, "node": node}, "test"))

    fleet = start(10**9)
    room = int(fleet.engine.node.state.reserve_bytes + 1.9 * fleet.infos[0].weight_bytes)
    fleet.engine.close()
    fleet.close()
    with pytest.raises(InputError, match=r"models\.1\.preload: b does not fit"):
        start(room)


def test_wrong_fields_of_a_config_are_named(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    for text, words in (
        ('[[models]]\npath = "a"\n[node]\nmemroy = "1GB"', "did you mean 'memory'"),
        ('[[models]]\npath = "a"\ntargets = "fast"', "models.0.targets"),
        ("models = 3", "models"),
        ("[[models]\n", "TOML"),
    ):
        config.write_text(text)
        code, output = run(str(config))
        assert code == 2 and words in output, output


def test_files_of_a_config_are_looked_for_beside_it(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    for field in ("api_keys", "admin_keys"):
        config.write_text(f'[[models]]\npath = "a"\n[server]\n{field} = "keys.txt"')
        code, output = run(str(config))
        assert code == 2 and f"cannot read the keys in {tmp_path / 'keys.txt'} (" in output
