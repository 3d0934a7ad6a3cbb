"""The testbed's models are whole, readable by transformers, and varied in what they generate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mmrl.cli.app import app
from mmrl.deploy import sources, testbed
from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.sources import RandomSource, Spread
from mmrl.errors import InputError, MmrlError

TINY = [name for name in testbed.MODELS if name.endswith("-tiny")]
TEXT = "The for statement is used to iterate. Héllo, 日本!\n\tEnd"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a tiny model in fp32, written once; not to be changed."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else testbed.create(name, root, dtype="fp32")

    return folder


def read(checkpoint: Checkpoint) -> list[torch.Tensor]:
    buffers = [torch.zeros(piece.nbytes, dtype=torch.uint8) for piece in checkpoint.pieces]
    checkpoint.read_into(buffers)
    return buffers


@pytest.mark.parametrize("name", TINY)
def test_the_tokenizer_goes_with_the_model(folders: Callable[[str], Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders(name))
    config = testbed.MODELS[name].config
    written = json.loads((folders(name) / "config.json").read_text())
    assert written["transformers_version"]  # else it may be taken for one of Mistral's faulty ones
    tokens = tokenizer(TEXT).input_ids
    assert tokenizer.decode(tokens) == TEXT
    assert len(tokens) < len(TEXT)  # trained: not a token for each byte
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"]
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n"
    special = set(tokenizer.all_special_ids)
    assert special >= {config["eos_token_id"], config["bos_token_id"]}
    assert all(tokenizer.decode([i]) for i in range(config["vocab_size"]) if i not in special)


@pytest.mark.parametrize("name", TINY)
def test_greedy_outputs_are_varied_and_depend_on_the_prompt(
    folders: Callable[[str], Path], name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders(name))
    outputs = []
    for seed in range(3):
        prompt = torch.randint(3, 2048, (1, 12), generator=torch.Generator().manual_seed(seed))
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(tuple(output[0, 12:].tolist()))
        assert len(set(outputs[-1])) >= 6
    assert len({output[-8:] for output in outputs}) == 3


@pytest.mark.parametrize("name", TINY)
def test_transformers_finds_every_tensor(folders: Callable[[str], Path], name: str) -> None:
    _, report = AutoModelForCausalLM.from_pretrained(folders(name), output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("name", testbed.MODELS)
def test_the_number_of_parameters_is_that_of_the_shape(name: str) -> None:
    with torch.device("meta"):
        config = testbed.configuration(name)
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == testbed.MODELS[name].parameters


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2.5-7b", 7.62), ("llama3.1-8b", 8.03), ("phi-3-mini", 3.82)]
)
def test_sizes_are_those_of_the_real_models(name: str, billions: float) -> None:
    assert testbed.MODELS[name].parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_seed_makes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = testbed.create("llama-tiny", tmp_path, name=name, seed=seed)
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert len(weights[0]) == len(weights[2])


def test_a_folder_without_weights_serves_the_same_weights(tmp_path: Path) -> None:
    whole = testbed.create("gemma2-tiny", tmp_path, seed=3)
    seed_only = testbed.create("gemma2-tiny", tmp_path, name="seed", seed=3, weights=False)
    assert not list(seed_only.glob("*.safetensors"))
    expected, found = Checkpoint.open(whole), Checkpoint.open(seed_only)
    assert found.pieces == expected.pieces and found.has_tokenizer
    assert all(map(torch.equal, read(found), read(expected)))
    config = testbed.configuration("gemma2-tiny")
    made = Checkpoint.from_config(config, "bf16", seed=3)
    assert all(map(torch.equal, read(made), read(expected)))


def test_a_seed_file_without_a_seed_is_told(tmp_path: Path) -> None:
    folder = testbed.create("llama-tiny", tmp_path, weights=False)
    (folder / "random-weights.json").write_text("{}")
    with pytest.raises(InputError, match="holds no seed"):
        Checkpoint.open(folder)


def test_random_values_are_spread_as_asked_and_rows_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCKS", (10_007,))  # shorter than the tensor, as for a real one
    source = RandomSource(0, {"a": Spread(0.5, 2.0), "b": Spread(0.5, 2.0)}, 512 * 64)
    table, other = torch.empty(512 * 64), torch.empty(512 * 64)
    source.read("a", 0, table)
    source.read("b", 0, other)
    assert float(table.mean()) == pytest.approx(0.5, abs=0.1)
    assert float(table.std()) == pytest.approx(2.0, rel=0.05)
    assert len(torch.unique(table.view(512, 64), dim=0)) == 512
    assert not torch.equal(table, other)
    part = torch.empty(1000)
    source.read("a", 9_500, part)
    assert torch.equal(part, table[9_500:10_500])


def test_weights_have_the_asked_type(tmp_path: Path) -> None:
    folder = testbed.create("opt-tiny", tmp_path, dtype="fp16")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert Checkpoint.open(folder).dtype == torch.float16


def test_an_existing_folder_is_replaced_only_by_force(tmp_path: Path) -> None:
    folder = testbed.create("llama-tiny", tmp_path)
    first = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"exists .*--force"):
        testbed.create("llama-tiny", tmp_path, seed=1)
    assert (folder / "model.safetensors").read_bytes() == first
    testbed.create("llama-tiny", tmp_path, seed=1, force=True)
    assert (folder / "model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["llama-tiny"]


def test_what_is_not_a_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="not a checkpoint"):
        testbed.create("llama-tiny", tmp_path, name="mine", force=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    folder = testbed.create("llama-tiny", tmp_path)
    before = (folder / "model.safetensors").read_bytes()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for name in ("llama-tiny", "other"):
        with pytest.raises(KeyboardInterrupt):
            testbed.create("llama-tiny", tmp_path, name=name, force=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["llama-tiny"]
    assert (folder / "model.safetensors").read_bytes() == before


class Usage(NamedTuple):
    free: int


def test_a_disk_without_room_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=10**9))
    with pytest.raises(MmrlError, match=r"15\.2 GB are needed, 1\.0 GB are free"):
        testbed.create("qwen2.5-7b", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "lama-tiny"}, "unknown model 'lama-tiny' .*'llama-tiny'"),
        ({"dtype": "bf61"}, "unknown data type 'bf61' .*'bf16'"),
        ({"name": "../up"}, "not the name of a folder"),
    ],
)
def test_wrong_words_are_told(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments = {"model": "llama-tiny", "out": tmp_path / "out", **options}
    with pytest.raises(InputError, match=message):
        testbed.create(**arguments)
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        testbed.create("llama-tiny", tmp_path / "file")


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    testbed.create("llama-tiny", tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * 1_262_720, 2 * 1_262_720)
    assert seen == sorted(seen)


def test_the_command_lists_all_models() -> None:
    result = CliRunner().invoke(app, ["testbed", "list"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert all(name in result.output for name in testbed.MODELS)


def test_the_command_writes_a_model(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--name", "mine", "--dtype", "fp32", "--seed", "4"]
    result = CliRunner().invoke(app, ["testbed", "create", "opt-tiny", *options])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "mine") in result.output
    assert Checkpoint.open(tmp_path / "mine").dtype == torch.float32
    result = CliRunner().invoke(app, ["testbed", "create", "opt-tiny", *options])
    assert isinstance(result.exception, InputError)
    result = CliRunner().invoke(
        app, ["testbed", "create", "opt-tiny", *options, "--force", "--no-weights"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "mine" / "random-weights.json").read_text()) == {"seed": 4}
