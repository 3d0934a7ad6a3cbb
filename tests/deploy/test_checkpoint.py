"""Checkpoints are read as transformers reads them, and what cannot be served is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    MptConfig,
    Phi3Config,
    PretrainedConfig,
    T5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmrl.deploy import testbed
from mmrl.deploy.checkpoint import Checkpoint
from mmrl.deploy.decoder import ALIGNMENT
from mmrl.errors import InputError, MmrlError
from mmrl.profiles import registry
from mmrl.profiles.derive import derive_profile
from mmrl.profiles.schema import SIZE_TOLERANCE

# Family: where its layers are, key and value heads, size of a head, qkv bias, tied.
FAMILIES: dict[str, tuple[str, int, int, bool, bool]] = {
    "llama-tiny": ("model.layers", 2, 32, False, False),
    "qwen2.5-tiny": ("model.layers", 2, 32, True, True),
    "qwen3-tiny": ("model.layers", 2, 32, False, True),
    "mistral-tiny": ("model.layers", 2, 32, False, False),
    "gemma2-tiny": ("model.layers", 2, 32, False, True),
    "gemma3-tiny": ("model.layers", 2, 32, False, True),
    "phi3-tiny": ("model.layers", 2, 32, False, False),
    "gpt-neox-tiny": ("gpt_neox.layers", 4, 32, True, False),
    "opt-tiny": ("model.decoder.layers", 4, 32, True, True),
}
PROMPT = torch.tensor([[5, 900, 31, 7, 1200, 44, 3, 3, 2000]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a tiny model in fp32, written once; not to be changed."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else testbed.create(name, root, dtype="fp32")

    return folder


@pytest.fixture
def llama(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be changed."""
    return _copy(folders("llama-tiny"), tmp_path)


@pytest.fixture
def tied(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Qwen2.5, whose head is its embedding table, to be changed."""
    return _copy(folders("qwen2.5-tiny"), tmp_path)


def _copy(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read all pieces and return the parameters as views of them."""
    buffers = [torch.empty(piece.nbytes, dtype=torch.uint8) for piece in checkpoint.pieces]
    chunks: list[int] = []
    checkpoint.read_into(buffers, chunks.append)
    assert sum(chunks) == checkpoint.tensor_bytes
    return {
        tensor.name: buffer[tensor.offset : tensor.offset + tensor.nbytes]
        .view(tensor.dtype)
        .view(tensor.shape)
        for piece, buffer in zip(checkpoint.pieces, buffers, strict=True)
        for tensor in piece.tensors
    }


def assemble(checkpoint: Checkpoint) -> nn.Module:
    """Build the module and give it its weights."""
    module = checkpoint.build()
    parameters = read(checkpoint)
    assert set(parameters) == {name for name, _ in module.named_parameters()}
    module.load_state_dict(parameters, strict=False, assign=True)
    module.tie_weights()  # type: ignore[operator]
    return module


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = module(input_ids=PROMPT).logits
    return output


def reference(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    save_file(edit(tensors), path, {"format": "pt"})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_transformers_computes(
    folders: Callable[[str], Path], name: str
) -> None:
    checkpoint = Checkpoint.open(folders(name))
    assert torch.equal(logits(assemble(checkpoint)), reference(folders(name)))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_reported_of_a_family(folders: Callable[[str], Path], name: str) -> None:
    checkpoint = Checkpoint.open(folders(name))
    path, kv_heads, head_dim, qkv_bias, tied = FAMILIES[name]
    assert (checkpoint.layers_path, checkpoint.layers) == (path, 4)
    assert (checkpoint.kv_heads, checkpoint.head_dim) == (kv_heads, head_dim)
    assert checkpoint.kv_bytes_per_token == 2 * 4 * kv_heads * head_dim * 4
    assert checkpoint.max_context == checkpoint.vocabulary == 2048
    assert checkpoint.eos == (testbed.MODELS[name].config["eos_token_id"],)
    assert (checkpoint.tied, checkpoint.has_tokenizer) == (tied, True)
    assert checkpoint.architecture().qkv_bias == qkv_bias
    assert checkpoint.parameters == testbed.MODELS[name].parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_are_the_base_and_the_layers_in_order(
    folders: Callable[[str], Path], name: str
) -> None:
    checkpoint = Checkpoint.open(folders(name))
    for i, piece in enumerate(checkpoint.pieces):
        own = f"{checkpoint.layers_path}.{i - 1}."
        end = 0
        for tensor in piece.tensors:
            assert tensor.name.startswith(own if i else "") and (i or ".layers." not in tensor.name)
            assert tensor.offset == -(-end // ALIGNMENT) * ALIGNMENT
            assert tensor.nbytes == torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
            end = tensor.offset + tensor.nbytes
        assert piece.nbytes == -(-end // ALIGNMENT) * ALIGNMENT > 0
    assert checkpoint.weight_bytes == checkpoint.base_bytes + 4 * checkpoint.layer_bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_the_architecture_makes_a_profile_of_the_models_size(
    folders: Callable[[str], Path], name: str
) -> None:
    checkpoint = Checkpoint.open(folders(name))
    shape = checkpoint.architecture()
    profile = derive_profile(name, shape, registry.get_platform("h200"))
    assert profile.layer_bytes == pytest.approx(checkpoint.layer_bytes, rel=SIZE_TOLERANCE)
    assert profile.base_bytes == pytest.approx(checkpoint.base_bytes, rel=SIZE_TOLERANCE)
    assert profile.kv_bytes_per_token == checkpoint.kv_bytes_per_token
    if "intermediate_size" in testbed.MODELS[name].config and "neox" not in name:
        assert shape.intermediate_size == testbed.MODELS[name].config["intermediate_size"]


def test_a_real_models_architecture_is_that_of_its_measured_profile() -> None:
    for name in ("qwen2.5-0.5b", "llama3.2-3b"):
        checkpoint = Checkpoint.from_config(testbed.configuration(name), "bf16")
        profile = registry.get_profile("h200", name)
        assert checkpoint.architecture() == profile.architecture
        assert checkpoint.parameters == profile.parameters


def test_the_module_has_real_buffers_and_no_weights(folders: Callable[[str], Path]) -> None:
    module = Checkpoint.open(folders("gemma3-tiny")).build()
    assert not module.training
    assert all(value.is_meta and not value.requires_grad for value in module.parameters())
    original = AutoModelForCausalLM.from_pretrained(folders("gemma3-tiny"))
    expected = dict(original.named_buffers())
    buffers = dict(module.named_buffers())
    assert set(buffers) == set(expected) and "model.embed_tokens.embed_scale" in buffers
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert module.get_parameter("lm_head.weight") is module.get_parameter(
        "model.embed_tokens.weight"
    )


def test_a_module_can_attend_by_a_function_of_ones_own(folders: Callable[[str], Path]) -> None:
    calls = []

    def attend(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*arguments, **options)

    AttentionInterface.register("test_checkpoint", attend)
    checkpoint = Checkpoint.open(folders("llama-tiny"))
    module = checkpoint.build("test_checkpoint")
    module.load_state_dict(read(checkpoint), assign=True)
    logits(module)
    assert len(calls) == checkpoint.layers


def test_values_are_converted(folders: Callable[[str], Path]) -> None:
    original = read(Checkpoint.open(folders("llama-tiny")))
    converted = read(Checkpoint.open(folders("llama-tiny"), "bf16"))
    assert converted["lm_head.weight"].dtype == torch.bfloat16
    for name, value in original.items():
        assert torch.equal(converted[name], value.to(torch.bfloat16))
    assert Checkpoint.open(folders("llama-tiny"), torch.float16).dtype == torch.float16


def test_values_beyond_fp16_are_told(llama: Path) -> None:
    edit_weights(llama, lambda tensors: {**tensors, "model.norm.weight": torch.full((128,), 1e6)})
    with pytest.raises(InputError, match=r"model\.norm\.weight.*fp16"):
        read(Checkpoint.open(llama, "fp16"))


def test_the_stored_type_decides_where_the_configuration_is_silent(llama: Path) -> None:
    edit_config(llama, torch_dtype=None)
    assert Checkpoint.open(llama).dtype == torch.float32


def test_shards_are_read_as_one(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testbed, "SHARD_BYTES", 10**6)
    folder = testbed.create("llama-tiny", tmp_path, dtype="fp32")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    whole, sharded = read(Checkpoint.open(folders("llama-tiny"))), read(Checkpoint.open(folder))
    assert all(torch.equal(sharded[name], value) for name, value in whole.items())
    assert torch.equal(reference(folder), reference(folders("llama-tiny")))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("gpt_neox."),
        lambda name: name.replace("lm_head.", "embed_out."),
        lambda name: f"language_model.{name}",
        lambda name: name.replace("gpt_neox.", "gpt_neox.language_model."),
    ],
)
def test_names_that_files_use(
    folders: Callable[[str], Path], tmp_path: Path, rename: Callable[[str], str]
) -> None:
    folder = _copy(folders("gpt-neox-tiny"), tmp_path)
    edit_weights(folder, lambda tensors: {rename(name): t for name, t in tensors.items()})
    expected = read(Checkpoint.open(folders("gpt-neox-tiny")))
    found = read(Checkpoint.open(folder))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_text_part_of_a_model_that_sees(folders: Callable[[str], Path], tmp_path: Path) -> None:
    text = testbed.configuration("gemma3-tiny")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    folder = _copy(folders("gemma3-tiny"), tmp_path)
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, dtype="float32")
    (folder / "config.json").write_text(config.to_json_string())
    edit_weights(folder, lambda old: {f"language_model.{name}": t for name, t in old.items()})
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(logits(assemble(checkpoint)), reference(folders("gemma3-tiny")))


def test_tied_tables_may_be_stored_once_under_either_name_or_twice(
    folders: Callable[[str], Path], tied: Path
) -> None:
    expected = reference(folders("qwen2.5-tiny"))
    table = "model.embed_tokens.weight"
    edit_weights(tied, lambda tensors: {**tensors, "lm_head.weight": tensors[table].clone()})
    assert torch.equal(logits(assemble(Checkpoint.open(tied))), expected)
    edit_weights(tied, lambda tensors: {n: t for n, t in tensors.items() if n != table})
    assert torch.equal(logits(assemble(Checkpoint.open(tied))), expected)


def test_tied_tables_that_differ_are_refused(tied: Path) -> None:
    table = "model.embed_tokens.weight"
    edit_weights(tied, lambda tensors: {**tensors, "lm_head.weight": tensors[table] * 2})
    with pytest.raises(InputError, match=r"they differ .*tie_word_embeddings"):
        Checkpoint.open(tied)


def test_end_tokens_are_those_of_generation(llama: Path) -> None:
    (llama / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert Checkpoint.open(llama).eos == (7, 9)
    (llama / "generation_config.json").unlink()
    assert Checkpoint.open(llama).eos == (2,)
    edit_config(llama, eos_token_id=None)
    assert Checkpoint.open(llama).eos == ()


@pytest.mark.parametrize("token", [-1, 2048])
def test_an_end_token_that_is_none_of_the_model_is_refused(llama: Path, token: int) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, token]}))
    with pytest.raises(InputError, match=rf"eos_token_id {token} is none of the model's 2048"):
        Checkpoint.open(llama)


def test_a_missing_tokenizer_is_reported(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    assert not Checkpoint.open(llama).has_tokenizer


def test_frequencies_of_longrope_stay_as_they_are() -> None:
    """Else a long neighbour in the batch would change a short sequence's tokens."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    config = Phi3Config(
        **{
            **testbed.MODELS["phi3-tiny"].config,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", **factors},
        }
    )
    checkpoint = Checkpoint.from_config(config, "fp32")
    assert checkpoint.max_context == 64
    module = assemble(checkpoint)
    before = [buffer.clone() for buffer in module.buffers()]
    alone = logits(module)
    with torch.no_grad():
        module(input_ids=torch.zeros((1, 100), dtype=torch.int64))
    assert all(map(torch.equal, module.buffers(), before))
    assert torch.equal(logits(module), alone)


def _config(config: PretrainedConfig) -> Callable[[Path], None]:
    return _write("config.json", config.to_json_string().encode())


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _extend(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"0")


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return edit


def _move_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][0] -= 4
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(content[:8] + text + content[8 + length :])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _index(content: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(content)

    return edit


def _drop_a_tensor(folder: Path) -> None:
    edit_weights(folder, lambda old: {n: t for n, t in old.items() if ".2.mlp.up" not in n})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        r"quantised \(use the original",
    ),
    "encoder-decoder": (_config(T5Config()), "an encoder-decoder"),
    "encoder": (_config(BertConfig(num_hidden_layers=2)), "not a plain decoder"),
    "bloom": (_config(BloomConfig()), "ALiBi"),
    "mpt": (_config(MptConfig()), "ALiBi"),
    "falcon with alibi": (_config(FalconConfig(alibi=True)), "ALiBi"),
    "no configuration": (_remove("config.json"), r"cannot read .*config\.json: no such file"),
    "broken configuration": (_write("config.json", b"{"), "not valid JSON"),
    "unknown kind": (lambda f: edit_config(f, model_type="nonesuch"), "not understood: .*nonesuch"),
    "odd shape": (lambda f: edit_config(f, num_attention_heads=3, head_dim=None), "checkpoint"),
    "odd generation": (_write("generation_config.json", b"{"), "generation_config.*not valid JSON"),
    "no weights": (_remove("model.safetensors"), r"holds no model\.safetensors"),
    "pickled": (_pickle, r"pickled \(pytorch_model\.bin\).*save_pretrained"),
    "cut off": (_cut, "cut off .*of .* bytes"),
    "cut off within the header": (_cut_header, "cut off within its header"),
    "too long": (_extend, "longer than its header says"),
    "not safetensors": (_write("model.safetensors", b"\xff" * 100), "not a safetensors file"),
    "empty": (_write("model.safetensors", b""), "not a safetensors file"),
    "damaged header": (_write("model.safetensors", b"\3" + bytes(7) + b"{a}"), "header is damaged"),
    "git-lfs": (_write("model.safetensors", b"version https://git-lfs"), "run git lfs pull"),
    "damaged place": (_move_a_tensor, r"'model\.norm\.weight' is damaged"),
    "tensor missing": (_drop_a_tensor, r"1 of 39 tensors .*model\.layers\.2\.mlp\.up_proj"),
    "other shape": (lambda f: edit_config(f, intermediate_size=300), r"shape \[352, 128\].*\[300,"),
    "broken index": (_index("[]"), "not an index"),
    "shard missing": (_index('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing"),
    "shard elsewhere": (_index('{"weight_map": {"a": "../b"}}'), "not a file of this folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_a_remedy(llama: Path, case: str) -> None:
    edit, message = REFUSED[case]
    edit(llama)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(llama)
    assert "\n" not in str(caught.value) and caught.value.remedy


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(InputError, match="no folder 'none'"):
        Checkpoint.open("none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        Checkpoint.open(tmp_path / "file")


def test_a_misspelt_folder_is_answered_with_the_nearest_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str, **options: Any) -> str:
        raise OSError("cannot connect")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    for name in ("models/llama-tiny", "models/mistral-tiny"):
        (tmp_path / name).mkdir(parents=True)
    for wrong in ("models/llama-tin", Path("models/llama-tin")):  # the first may be a hub id
        with pytest.raises(InputError, match=r"^no folder 'models/llama-tin' ") as caught:
            Checkpoint.open(wrong)
        assert caught.value.remedy == "did you mean 'models/llama-tiny'?"
    with pytest.raises(InputError, match="the hub did not give it: cannot connect"):
        Checkpoint.open("models/qwen")


def test_a_hub_id_is_downloaded(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def offline(name: str, **options: Any) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("cannot connect\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        InputError, match=r"the hub did not give it: cannot connect and more \("
    ) as caught:
        Checkpoint.open("org/name-1.5b")
    assert asked == ["org/name-1.5b"] and "\n" not in str(caught.value)
    there = str(folders("llama-tiny"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: there)
    assert Checkpoint.open("org/name-1.5b").layers == 4


def test_an_unknown_data_type_suggests_the_nearest(llama: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'bf16'"):
        Checkpoint.open(llama, "bfloat16")


def test_a_file_cut_off_after_opening_is_told(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    _cut(llama)
    with pytest.raises(MmrlError, match="shorter than when it was opened"):
        read(checkpoint)


def test_a_file_removed_after_opening_is_told(llama: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(MmrlError, match=r"cannot read .*no such file"):
        read(checkpoint)
