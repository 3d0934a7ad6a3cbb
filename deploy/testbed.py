"""Models to try the system with: real architectures and sizes, random weights, no network.

`create` writes a checkpoint folder that transformers reads like any other: configuration, sharded
safetensors, a tokenizer and a chat template. The weights are random and say nothing, but their
sizes, shapes and speeds are those of the real model, and what they generate depends on every
layer and on all of the prompt. Instead of weights a folder may hold their seed; `Checkpoint`
then fills memory directly, which needs no disk.
"""

import itertools
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, PretrainedConfig
from transformers import __version__ as transformers_version

from mmrl.deploy.checkpoint import CHUNK_BYTES, DTYPES, RANDOM_FILE, Checkpoint
from mmrl.deploy.decoder import TensorSpec
from mmrl.deploy.sources import FLOATS, INDEX_FILE, SINGLE_FILE
from mmrl.errors import InputError, MmrlError, unknown
from mmrl.files import FULL_DISK

SHARD_BYTES = 5 * 10**9
MERGES = 4096 - 256  # of the trained tokenizer, where the vocabulary has room
DISK_RESERVE = 64 * 2**20  # for the tokenizer and the file system's own, bytes
SPARE_TOKENS = 16  # room for special tokens within a vocabulary
STORED = {dtype: name for name, dtype in FLOATS.items()}

EOS = "<|end|>"
BOS = "<|endoftext|>"  # a name that Qwen's tokenizer adds to every vocabulary that lacks it

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


class Model(NamedTuple):
    """A model of the testbed.

    Attributes:
        like: The model whose shape it has, or the family of a tiny one.
        parameters: Number of its parameters, tied ones once.
        config: What its config.json says.
    """

    like: str
    parameters: int
    config: dict[str, Any]


def _llama(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": False,
        **config,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _qwen2(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
        **config,
    }


def _qwen3(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 128,
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": True,
        **config,
    }


def _mistral(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "vocab_size": 32768,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **config,
    }


def _gemma2(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "vocab_size": 256000,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        **config,
    }


def _gemma3(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "vocab_size": 262144,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
        **config,
    }


def _phi3(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
        "vocab_size": 32064,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "tie_word_embeddings": False,
        **config,
    }


def _gpt_neox(**config: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "max_position_embeddings": 2048,
        "vocab_size": 50304,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        **config,
    }


def _opt(intermediate_size: int, **config: Any) -> dict[str, Any]:
    return {
        "ffn_dim": intermediate_size,
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "word_embed_proj_dim": config["hidden_size"],
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
        **config,
    }


def _size(
    hidden: int, width: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any
) -> dict[str, Any]:
    size = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }
    return size if kv_heads is None else {**size, "num_key_value_heads": kv_heads}


# Small enough for tests, with every trait of the family; windows short enough to matter.
TINY = {"vocab_size": 2048, "max_position_embeddings": 2048}
TINY_IDS = {"bos_token_id": 1, "eos_token_id": 2}
TINY_SIZE = _size(128, 352, 4, 4, 2)
TINY_HEAD = {"head_dim": 32}

MODELS = {
    "llama-tiny": Model("Llama", 1_262_720, _llama(**TINY_SIZE, **TINY, **TINY_IDS)),
    "qwen2.5-tiny": Model("Qwen2.5", 1_001_600, _qwen2(**TINY_SIZE, **TINY, **TINY_IDS)),
    "qwen3-tiny": Model("Qwen3", 1_000_832, _qwen3(**TINY_SIZE, **TINY, **TINY_IDS, **TINY_HEAD)),
    "mistral-tiny": Model("Mistral", 1_262_720, _mistral(**TINY_SIZE, **TINY, sliding_window=64)),
    "gemma2-tiny": Model(
        "Gemma 2",
        1_001_600,
        _gemma2(**TINY_SIZE, **TINY, **TINY_HEAD, query_pre_attn_scalar=32, sliding_window=64),
    ),
    "gemma3-tiny": Model(
        "Gemma 3",
        1_001_856,
        _gemma3(
            **TINY_SIZE,
            **TINY,
            **TINY_HEAD,
            query_pre_attn_scalar=32,
            sliding_window=64,
            sliding_window_pattern=2,
        ),
    ),
    "phi3-tiny": Model(
        "Phi-3",
        1_262_720,
        _phi3(
            **TINY_SIZE,
            **TINY,
            **TINY_IDS,
            original_max_position_embeddings=2048,
            pad_token_id=2,
            sliding_window=None,
        ),
    ),
    "gpt-neox-tiny": Model("GPT-NeoX", 1_317_632, _gpt_neox(**_size(128, 512, 4, 4), **TINY)),
    "opt-tiny": Model("OPT", 1_317_888, _opt(**_size(128, 512, 4, 4), **TINY)),
    "opt-125m": Model("OPT 125M", 125_239_296, _opt(**_size(768, 3072, 12, 12))),
    "opt-1.3b": Model("OPT 1.3B", 1_315_758_080, _opt(**_size(2048, 8192, 24, 32))),
    "pythia-410m": Model("Pythia 410M", 405_334_016, _gpt_neox(**_size(1024, 4096, 24, 16))),
    "pythia-1.4b": Model("Pythia 1.4B", 1_414_647_808, _gpt_neox(**_size(2048, 8192, 24, 16))),
    "qwen2.5-0.5b": Model("Qwen2.5 0.5B", 494_032_768, _qwen2(**_size(896, 4864, 24, 14, 2))),
    "qwen2.5-1.5b": Model("Qwen2.5 1.5B", 1_543_714_304, _qwen2(**_size(1536, 8960, 28, 12, 2))),
    "qwen2.5-3b": Model("Qwen2.5 3B", 3_085_938_688, _qwen2(**_size(2048, 11008, 36, 16, 2))),
    "qwen2.5-7b": Model(
        "Qwen2.5 7B",
        7_615_616_512,
        _qwen2(**_size(3584, 18944, 28, 28, 4), vocab_size=152064, tie_word_embeddings=False),
    ),
    "qwen2.5-14b": Model(
        "Qwen2.5 14B",
        14_770_033_664,
        _qwen2(**_size(5120, 13824, 48, 40, 8), vocab_size=152064, tie_word_embeddings=False),
    ),
    "qwen3-0.6b": Model("Qwen3 0.6B", 596_049_920, _qwen3(**_size(1024, 3072, 28, 16, 8))),
    "qwen3-4b": Model("Qwen3 4B", 4_022_468_096, _qwen3(**_size(2560, 9728, 36, 32, 8))),
    "llama3.2-1b": Model(
        "Llama 3.2 1B",
        1_235_814_400,
        _llama(
            rope_scaling=_llama3_rope(32.0),
            **_size(2048, 8192, 16, 32, 8, head_dim=64),
            tie_word_embeddings=True,
        ),
    ),
    "llama3.2-3b": Model(
        "Llama 3.2 3B",
        3_212_749_824,
        _llama(
            rope_scaling=_llama3_rope(32.0),
            **_size(3072, 8192, 28, 24, 8, head_dim=128),
            tie_word_embeddings=True,
        ),
    ),
    "llama3.1-8b": Model(
        "Llama 3.1 8B",
        8_030_261_248,
        _llama(rope_scaling=_llama3_rope(8.0), **_size(4096, 14336, 32, 32, 8)),
    ),
    "mistral-7b": Model(
        "Mistral 7B v0.3", 7_248_023_552, _mistral(**_size(4096, 14336, 32, 32, 8))
    ),
    "gemma-2-2b": Model(
        "Gemma 2 2B", 2_614_341_888, _gemma2(**_size(2304, 9216, 26, 8, 4, head_dim=256))
    ),
    "gemma-3-1b": Model(
        "Gemma 3 1B", 999_885_952, _gemma3(**_size(1152, 6912, 26, 4, 1, head_dim=256))
    ),
    "phi-3-mini": Model("Phi-3 mini 4k", 3_821_079_552, _phi3(**_size(3072, 8192, 32, 32, 32))),
}


def get_model(name: str) -> Model:
    """Return a model of the testbed.

    Raises:
        InputError: There is none of this name; suggests the nearest.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def configuration(name: str) -> PretrainedConfig:
    """Return the configuration of a model of the testbed, for `Checkpoint.from_config`."""
    fields = dict(get_model(name).config)
    config: PretrainedConfig = AutoConfig.for_model(**fields)
    return config


def create(
    model: str,
    out: Path,
    *,
    dtype: str = "bf16",
    name: str | None = None,
    seed: int = 0,
    weights: bool = True,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a checkpoint with random weights; the folder appears whole or not at all.

    Args:
        model: Name of a model of the testbed.
        out: Folder to write it into, made if missing.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        name: Name of its folder in out; the model's if left out.
        seed: Every seed gives other weights.
        weights: False to write their seed in their place, which only `Checkpoint` can read.
        force: Replace a checkpoint of that name.
        progress: Called with the bytes of weights written and their total.

    Returns:
        The folder of the checkpoint.

    Raises:
        InputError: There is no such model or data type, or the folder exists or cannot be made.
        MmrlError: The disk has no room.
    """
    config = get_model(model).config
    if dtype not in DTYPES:
        raise unknown("data type", dtype, DTYPES)
    if name is not None and (Path(name).name != name or name in (".", "..")):
        raise InputError(f"--name: '{name}' is not the name of a folder", "give a plain name")
    target = out / (name or model)
    _check_place(target, force)
    checkpoint = Checkpoint.from_config(configuration(model), dtype, seed)
    with _new_folder(target, checkpoint.tensor_bytes if weights else 0) as folder:
        torch_dtype = str(DTYPES[dtype]).removeprefix("torch.")
        # Without a version transformers takes the tokenizer for one of Mistral's faulty ones.
        written = {"torch_dtype": torch_dtype, "transformers_version": transformers_version}
        _write_json(folder / "config.json", config | written)
        ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
        _write_json(folder / "generation_config.json", ids)
        _write_tokenizer(folder, config)
        if weights:
            _write_weights(folder, checkpoint, progress)
        else:
            _write_json(folder / RANDOM_FILE, {"seed": seed})
    return target


def _check_place(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not (target / "config.json").is_file():
        raise InputError(f"{target}: exists and is not a checkpoint", "choose another --name")
    if not force:
        raise InputError(f"{target}: exists", "choose another --name, or replace it with --force")


@contextmanager
def _new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Yield a folder that takes its place at target when the block ends without an exception."""
    parent = target.parent
    temporary = parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write to {parent}: {reason}", "choose another --out") from error
    try:
        free = shutil.disk_usage(parent).free
        if nbytes + DISK_RESERVE > free:
            raise MmrlError(
                f"{parent}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
                "choose another --out, or --no-weights",
            )
        yield temporary
        if target.exists():
            old = temporary.with_suffix(".old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise MmrlError(f"disk full while writing {target}", "free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path, checkpoint: Checkpoint, progress: Callable[[int, int], None]
) -> None:
    """Write all tensors to one safetensors file, or to several and their index."""
    shards: list[list[TensorSpec]] = [[]]
    for tensor in itertools.chain.from_iterable(piece.tensors for piece in checkpoint.pieces):
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    total, done = checkpoint.tensor_bytes, 0
    chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                for first in range(0, tensor.nbytes, CHUNK_BYTES):
                    part = chunk[: min(CHUNK_BYTES, tensor.nbytes - first)]
                    element = first // tensor.dtype.itemsize
                    checkpoint.read(tensor.name, element, part.view(tensor.dtype))
                    file.write(part.numpy().data)
                    done += part.nbytes
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / INDEX_FILE, index)


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        fields[tensor.name] = {
            "dtype": STORED[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return struct.pack("<Q", len(text)) + text


def _write_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Write a byte-level BPE tokenizer whose vocabulary has exactly the model's size.

    Special tokens stand at the ids that the configuration gives them. What the vocabulary has
    beyond bytes and trained merges is filled with words of syllables, so that whatever a model of
    random weights generates is text.
    """
    size = config["vocab_size"]
    special = {config["eos_token_id"]: EOS}
    for key, token in (("bos_token_id", BOS), ("pad_token_id", "<|pad|>")):
        if config.get(key) is not None:
            special.setdefault(config[key], token)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _trained_merges()[: max(0, min(MERGES, size // 2 - len(alphabet) - SPARE_TOKENS))]
    known = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)])
    words = itertools.chain(known, (word for word in _words() if word not in known))
    vocabulary = {special.get(i) or next(words): i for i in range(size)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for key in ("bos_token", "eos_token", "pad_token"):
        if config.get(f"{key}_id") is not None:
            fields[key] = special[config[f"{key}_id"]]
    _write_json(folder / "tokenizer_config.json", fields)


@cache
def _trained_merges() -> list[tuple[str, str]]:
    """Train merges on the reference manual that comes with Python."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=256 + MERGES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _words() -> Iterator[str]:
    """Yield words of two, three and more syllables, each with a space before it."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    for length in itertools.count(2):
        for word in itertools.product(syllables, repeat=length):
            yield "Ġ" + "".join(word)  # byte-level BPE's letter for a space
