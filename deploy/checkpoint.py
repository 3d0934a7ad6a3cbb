"""A model's files: opened, checked, and read straight to where the weights belong.

A `Checkpoint` is opened in a second whatever its size: its configuration and the headers of its
files are read and checked, what cannot be served is refused with a remedy, and every parameter of
the module (`mmrl.deploy.decoder`) is found among the stored tensors.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from mmrl.deploy.decoder import OTHER, Decoder, Piece, construct, freeze_rope, line, observe
from mmrl.deploy.sources import (
    INDEX_FILE,
    SINGLE_FILE,
    FileSource,
    RandomSource,
    Source,
    Stored,
    stored_tensors,
)
from mmrl.errors import InputError, unknown
from mmrl.profiles.schema import Architecture

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANDOM_FILE = "random-weights.json"  # in place of weight files: {"seed": 0}
CHUNK_BYTES = 32 * 2**20  # read at a time: bounds what a conversion holds
READERS = 4  # threads; more do not read faster from one disk
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
SAMPLES, SAMPLE = 64, 2048  # places, and elements each, where tied tables are compared
SHAPE_TOLERANCE = 0.01  # up to here `architecture` keeps the configuration's own numbers


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be served; made by `open` or `from_config`.

    Attributes:
        path: Its folder; None for one made from a configuration.
        config: Configuration of the (text) decoder.
        dtype: Data type of the weights in memory, and of keys and values.
        pieces: The base weights, then every decoder layer in order of execution.
        layers_path: Name of the list of decoder layers in the module, such as ``model.layers``.
        kv_heads: Heads of the keys and values, the same in every layer.
        head_dim: Values of one head.
        max_context: Most tokens of prompt and output together.
        eos: End-of-sequence tokens.
        tied: Whether the output head is the embedding table.
        has_tokenizer: Whether the folder holds a tokenizer.
    """

    path: Path | None
    config: PretrainedConfig
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    layers_path: str
    kv_heads: int
    head_dim: int
    max_context: int
    eos: tuple[int, ...]
    tied: bool
    has_tokenizer: bool
    _qkv_bias: bool
    _source: Source

    @classmethod
    def open(cls, path_or_id: str | Path, dtype: str | torch.dtype | None = None) -> Self:
        """Open a local folder, or a model of the hub, which is downloaded first.

        Args:
            path_or_id: A folder, or an id such as ``Qwen/Qwen2.5-0.5B``.
            dtype: ``bf16``, ``fp16`` or ``fp32`` (or the torch type); as configured if left out.

        Raises:
            InputError: There is no such model, it is of a kind that cannot be served, or its
                files are damaged.
        """
        folder = _folder(path_or_id)
        config = _configuration(folder)
        random = folder / RANDOM_FILE
        stored = {} if random.is_file() else stored_tensors(folder)
        resolved = _dtype(str(folder), config, dtype, stored)
        decoder = observe(str(folder), config, resolved)
        source = (
            _random_source(_seed(random), decoder)
            if random.is_file()
            else FileSource(_match(folder, decoder, stored))
        )
        return cls._of(folder, config, resolved, decoder, source)

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, dtype: str | torch.dtype | None = None, seed: int = 0
    ) -> Self:
        """Make a model of random weights that needs no files; see `mmrl.deploy.testbed`.

        Raises:
            InputError: It is of a kind that cannot be served.
        """
        name = f"{config.model_type} configuration"
        _refuse(name, config, config.to_dict())
        resolved = _dtype(name, config, dtype, {})
        decoder = observe(name, config, resolved)
        return cls._of(None, config, resolved, decoder, _random_source(seed, decoder))

    @classmethod
    def _of(
        cls,
        path: Path | None,
        config: PretrainedConfig,
        dtype: torch.dtype,
        decoder: Decoder,
        source: Source,
    ) -> Self:
        return cls(
            path=path,
            config=config,
            dtype=dtype,
            pieces=decoder.pieces,
            layers_path=decoder.layers_path,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            max_context=_max_context(str(path or config.model_type), config),
            eos=_eos(path, config),
            tied=decoder.tied,
            has_tokenizer=path is not None and any((path / n).is_file() for n in TOKENIZER_FILES),
            _qkv_bias=decoder.qkv_bias,
            _source=source,
        )

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.pieces) - 1

    @property
    def base_bytes(self) -> int:
        """Bytes of the base weights: everything outside the decoder layers."""
        return self.pieces[0].nbytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest decoder layer."""
        return max(piece.nbytes for piece in self.pieces[1:])

    @property
    def weight_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all parameters: what `read_into` reports in all."""
        return sum(tensor.nbytes for piece in self.pieces for tensor in piece.tensors)

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(t.nbytes // t.dtype.itemsize for piece in self.pieces for t in piece.tensors)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token leaves in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model knows."""
        return int(self.config.vocab_size)

    def read_into(
        self, buffers: Sequence[torch.Tensor], progress: Callable[[int], None] = lambda _: None
    ) -> None:
        """Read all weights into host memory, converted where the stored type is another.

        Args:
            buffers: One flat uint8 tensor for each piece, of at least its bytes.
            progress: Called on this thread with the bytes of each chunk when it has arrived, in
                order; their sum is `tensor_bytes`.

        Raises:
            MmrlError: A file cannot be read, or has changed since it was opened.
        """
        chunks = list(self._chunks(buffers))
        pool = ThreadPoolExecutor(READERS, thread_name_prefix="weights")
        try:
            done = pool.map(lambda chunk: self._source.read(*chunk), chunks)
            for (_, _, out), _ in zip(chunks, done, strict=True):
                progress(out.nbytes)
        finally:
            pool.shutdown(cancel_futures=True)
            self._source.close()

    def _chunks(self, buffers: Sequence[torch.Tensor]) -> Iterator[tuple[str, int, torch.Tensor]]:
        for piece, buffer in zip(self.pieces, buffers, strict=True):
            for tensor in piece.tensors:
                whole = buffer[tensor.offset : tensor.offset + tensor.nbytes].view(tensor.dtype)
                step = CHUNK_BYTES // tensor.dtype.itemsize
                for first in range(0, len(whole), step):
                    yield tensor.name, first, whole[first : first + step]

    def read(self, name: str, first: int, out: torch.Tensor) -> None:
        """Fill out, a flat tensor of any type, with elements of a parameter, from ``first`` on.

        Raises:
            MmrlError: A file cannot be read, or has changed since it was opened.
        """
        self._source.read(name, first, out)

    def build(self, attn_implementation: str | None = None) -> nn.Module:
        """Build the module without weights, to be given parameters that stand elsewhere.

        Parameters are on the meta device, tied ones are one object, and none wants gradients;
        buffers, which no file holds, are real and on the CPU. While it builds, no other thread
        may construct modules (accelerate's `init_empty_weights` acts on all of them).

        Args:
            attn_implementation: Name of an attention function that transformers knows or that
                was registered with it; its own choice if left out.
        """
        # Not torch.device("meta"): the buffers would be lost, and rotary frequencies with them.
        with init_empty_weights(include_buffers=False):
            module = construct(self.config, self.dtype, attn_implementation)
        # It has replaced parameters one by one, tied ones too.
        module.tie_weights()
        freeze_rope(module)
        return module

    def architecture(self) -> Architecture:
        """Describe the model's shape for a derived profile.

        A profile's architecture has a gated feed-forward network and no positions to learn. Where
        this model differs, width and vocabulary are those that give its number of parameters.
        """
        config, itemsize = self.config, self.dtype.itemsize
        width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 0
        shape = Architecture(
            layers=self.layers,
            hidden_size=config.hidden_size,
            intermediate_size=width or 4 * config.hidden_size,
            attention_heads=config.num_attention_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=self.vocabulary,
            tied_embeddings=self.tied,
            qkv_bias=self._qkv_bias,
            bytes_per_value=itemsize,
        )
        excess = self.layer_bytes // itemsize - shape.layer_parameters
        if abs(excess) > SHAPE_TOLERANCE * shape.layer_parameters:
            width = shape.intermediate_size + round(excess / (3 * shape.hidden_size))
            shape = shape.model_copy(update={"intermediate_size": width})
        excess = self.base_bytes // itemsize - shape.base_parameters
        if abs(excess) > SHAPE_TOLERANCE * shape.base_parameters:
            tables = 1 if self.tied else 2
            vocabulary = shape.vocabulary + round(excess / (tables * shape.hidden_size))
            shape = shape.model_copy(update={"vocabulary": vocabulary})
        return shape


def _folder(path_or_id: str | Path) -> Path:
    """Return the local folder of a model, downloaded if it is on the hub."""
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}: not a folder", "name the folder that holds config.json")
    if isinstance(path_or_id, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path_or_id):
        remedy = _nearest_folder(path) or "name a folder, or a hub id such as ORG/NAME"
        raise InputError(f"no folder '{path_or_id}'", remedy)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # what the hub's client raises derives from these
        if near := _nearest_folder(path):  # a folder was meant, whatever the hub says
            raise InputError(f"no folder '{path_or_id}'", near) from error
        raise InputError(
            f"no folder '{path_or_id}', and the hub did not give it: {line(error)}",
            "correct the name, or download it where there is a network and name its folder",
        ) from error


def _nearest_folder(path: Path) -> str:
    """Return ``did you mean 'x'?`` for the folder that a path misspells, or an empty string."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    # By their names alone: the path that they share would make any two of them look alike.
    close = difflib.get_close_matches(path.name, [one.name for one in beside if one.is_dir()], n=1)
    return f"did you mean '{path.with_name(close[0])}'?" if close else ""


def _configuration(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot read {path}: {reason}", "name the folder of a transformers checkpoint"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON", "copy or download it again") from error
    try:
        # An explicit False: the default would ask at the terminal whether to run the model's code.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers validates with errors of many kinds
        remedy = "code that a checkpoint brings is never run" if "auto_map" in raw else OTHER
        raise InputError(f"{path}: not understood: {line(error)}", remedy) from error
    _refuse(str(folder), config, raw)
    text: PretrainedConfig = config.get_text_config(decoder=True)  # of a model that sees, too
    if text is not config and text.dtype is None:
        text.dtype = config.dtype
    return text


def _refuse(name: str, config: PretrainedConfig, raw: Mapping[str, Any]) -> None:
    """Refuse what is known not to work before anything is built."""
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise InputError(f"{name}: quantised", "use the original checkpoint (bf16, fp16 or fp32)")
    if config.is_encoder_decoder:
        raise InputError(f"{name}: an encoder-decoder", "use a decoder-only model")
    if (
        config.model_type in ("bloom", "mpt")
        or getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", "") == "alibi"
    ):
        raise InputError(f"{name}: ALiBi positions are not supported", OTHER)


def _dtype(
    name: str,
    config: PretrainedConfig,
    wanted: str | torch.dtype | None,
    stored: Mapping[str, Stored],
) -> torch.dtype:
    """Return the wanted type, or the configured one, or that of the largest stored tensor."""
    if isinstance(wanted, str):
        if wanted not in DTYPES:
            raise unknown("data type", wanted, DTYPES)
        return DTYPES[wanted]
    largest = max(stored.values(), key=lambda t: torch.Size(t.shape).numel(), default=None)
    dtype = wanted or config.dtype or (largest.dtype if largest else torch.float32)
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise InputError(f"{name}: data type {dtype}", "ask for bf16, fp16 or fp32")
    return dtype


def _random_source(seed: int, decoder: Decoder) -> RandomSource:
    sizes = [t.nbytes // t.dtype.itemsize for piece in decoder.pieces for t in piece.tensors]
    return RandomSource(seed, decoder.spreads, max(sizes))


def _seed(path: Path) -> int:
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: holds no seed", "write it with mmrl testbed create") from error


def _match(folder: Path, decoder: Decoder, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Find every parameter of the module among the stored tensors."""
    found: dict[str, Stored] = {}
    missing: list[str] = []
    for tensor in (tensor for piece in decoder.pieces for tensor in piece.tensors):
        aliases = decoder.aliases[tensor.name]
        names = [name for alias in aliases for name in _stored_names(alias, decoder.prefix)]
        present = [name for name in names if name in stored]
        if not present:
            missing.append(tensor.name)
            continue
        first = stored[present[0]]
        if first.shape != tensor.shape:
            raise InputError(
                f"{first.path}: '{present[0]}' has shape {list(first.shape)}, but config.json "
                f"makes it {list(tensor.shape)}",
                "use the config.json that belongs to these weights",
            )
        if len(aliases) > 1:
            for other in present[1:]:
                _check_tied(folder, present[0], first, other, stored[other])
        found[tensor.name] = first
    if missing:
        total = len(missing) + len(found)
        raise InputError(
            f"{folder}: {len(missing)} of {total} tensors are missing, the first is '{missing[0]}'",
            f"{SINGLE_FILE} or {INDEX_FILE} is not complete, or this kind of model keeps its "
            "weights in a form that is not supported",
        )
    return found


def _stored_names(parameter: str, prefix: str) -> Iterator[str]:
    """Yield the names that files have for a parameter of the module."""
    bare = parameter.removeprefix(f"{prefix}.")
    yield parameter
    yield bare  # saved without the output head
    yield f"language_model.{parameter}"  # part of a model that sees, in two forms
    yield f"{prefix}.language_model.{bare}"
    if parameter.startswith("lm_head."):
        yield parameter.replace("lm_head.", "embed_out.")  # GPT-NeoX


def _check_tied(folder: Path, name: str, one: Stored, other_name: str, other: Stored) -> None:
    """Make sure that two stored copies of a tied table are the same, at some places of it."""
    same = one.shape == other.shape
    if same:
        total = torch.Size(one.shape).numel()
        source = FileSource({name: one, other_name: other})
        for i in range(SAMPLES):
            first = max(0, total - SAMPLE) * i // (SAMPLES - 1)
            values = torch.empty((2, min(SAMPLE, total)), dtype=torch.float32)
            source.read(name, first, values[0])
            source.read(other_name, first, values[1])
            same = same and torch.equal(values[0], values[1])
    if not same:
        raise InputError(
            f"{folder}: config.json ties '{name}' and '{other_name}', but they differ",
            'write "tie_word_embeddings": false in config.json',
        )


def _max_context(name: str, config: PretrainedConfig) -> int:
    """Return the longest context, which for LongRoPE ends before its frequencies change."""
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int):
        raise InputError(
            f"{name}: config.json gives no max_position_embeddings", "add the longest context"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        longest = min(longest, int(rope["original_max_position_embeddings"]))
    return longest


def _eos(path: Path | None, config: PretrainedConfig) -> tuple[int, ...]:
    """Return the end-of-sequence tokens: the generation configuration's, else the model's.

    Raises:
        InputError: The generation configuration cannot be read, or a token is not of this model,
            which would stop a GPU where `min_tokens` forbids it.
    """
    eos = config.eos_token_id
    if path is not None and (path / "generation_config.json").is_file():
        try:
            text = (path / "generation_config.json").read_text(encoding="utf-8")
            eos = json.loads(text).get("eos_token_id", eos)
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{path / 'generation_config.json'}: not valid JSON", "correct or remove it"
            ) from error
    if eos is None:
        return ()
    tokens = tuple(eos) if isinstance(eos, list) else (int(eos),)
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"{path or config.model_type}: eos_token_id {token} is none of the model's "
                f"{config.vocab_size} tokens",
                "correct it in generation_config.json and config.json",
            )
    return tokens
