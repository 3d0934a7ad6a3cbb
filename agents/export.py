"""`ExportedPolicy`: a trained policy as two files, read and run with NumPy alone.

A policy that was trained with both verb sets decides under either: its outputs are all nine verbs,
and under the core verbs those of the other five are left out.

``policy.safetensors`` holds the weights of the actor, ``policy.json`` what they mean: names of the
features and verbs, the prior rule with its parameters, where the policy comes from. Nothing is
unpickled, and neither torch nor Stable-Baselines3 is imported. The decisions are those of
the network in `mmrl.agents.policy`, whose formulas are repeated here.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from mmrl.envs.layout import Layout
from mmrl.errors import InputError, first_error
from mmrl.files import atomic_write, files_hash, write_json
from mmrl.node.actions import CORE_VERBS, verb_names
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES, N_GLOBAL, N_MODEL
from mmrl.rules import Rule, get_rule

FORMAT = 1
DEFAULT = "default"  # the policy that is shipped
DEFAULT_FOLDER = Path(__file__).parent / "data" / DEFAULT
WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"
BEST = "policy_best"  # of a run, the policy that it stands for
PRESENT = MODEL_FEATURES.index("weights")  # more than 0 for a model, 0 in padding
FULL = GLOBAL_FEATURES.index("full_verbs")
IMPOSSIBLE = -1e8  # logit of an action that is not legal, or of a verb left out
VerbSet = Literal["core", "full", "both"]
Floats = npt.NDArray[np.float32]


class PriorRule(BaseModel):
    """The rule on whose suggestion a policy builds: its name and parameters."""

    model_config = ConfigDict(extra="forbid")

    name: str
    params: dict[str, Any]

    @classmethod
    def of(cls, rule: Rule) -> "PriorRule":
        """Return what a policy's files say about a rule."""
        return cls(name=rule.name, params=rule.model_dump())

    def rule(self) -> Rule:
        """Return the rule itself."""
        return get_rule(self.name, **self.params)


class PolicyCard(BaseModel):
    """What ``policy.json`` says about a policy.

    Attributes:
        format: Version of this file.
        global_features: Names of the node's features that it reads, in order.
        model_features: Names of the features of each model.
        verb_set: ``core``, ``full``, or ``both`` for a policy that was trained with either.
        verbs: Names of the verbs, in the order of its outputs.
        without: Those among them that it may not use.
        width: Of its hidden layers.
        prior: The rule whose suggestion it reads; None without a prior.
        scenarios: Trained on these.
        seed: Of the training.
        steps: Decisions it was trained on.
        versions: Of the software.
        git_commit: Of the project, where it was trained from a checkout.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    global_features: tuple[str, ...]
    model_features: tuple[str, ...]
    verb_set: VerbSet
    verbs: tuple[str, ...]
    without: tuple[str, ...] = ()
    width: int
    prior: PriorRule | None
    scenarios: tuple[str, ...] = ()
    seed: int | None = None
    steps: int = 0
    versions: dict[str, str] = {}
    git_commit: str | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of the actor."""
        node, model, verbs = len(self.global_features), len(self.model_features), len(self.verbs)
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.model.weight": (width, model),
            "encoder.model.bias": (width,),
            "encoder.node.weight": (width, node),
            "encoder.second.weight": (width, width),
            "encoder.second.bias": (width,),
            "encoder.context.weight": (width, 2 * width + node),
            "encoder.context.bias": (width,),
            "head.weight": (width, width),
            "head.bias": (width,),
            "head_context.weight": (width, width),
            "verbs.weight": (verbs, width),
            "verbs.bias": (verbs,),
            "wait.weight": (1, width),
            "wait.bias": (1,),
        }
        if self.prior is not None:
            shapes |= {"encoder.extra.weight": (width, verbs), "beta": (2,)}
        return shapes


class ExportedPolicy:
    """A policy that decides: observations and masks in, actions out, for fleets of any size.

    Args:
        card: What the weights mean.
        weights: A float32 array for each of ``card.shapes()``.

    Attributes:
        card: What the weights mean.
        rule: The prior rule, whose suggestion follows each observation; None without a prior.
        name: Name of the folder it was read from, for tables.
        full_verbs: Whether it was trained with the full verbs.
    """

    def __init__(self, card: PolicyCard, weights: dict[str, Floats], name: str = "policy") -> None:
        self.card, self.weights, self.name = card, weights, name
        self.rule: Rule | None = card.prior.rule() if card.prior else None
        self.full_verbs = card.verb_set != "core"
        self._banned = np.array([verb in card.without for verb in card.verbs])

    def plays(self, full_verbs: bool) -> bool:
        """Whether it was trained with a verb set."""
        return self.card.verb_set in ("both", "full" if full_verbs else "core")

    def layout(self, observation_size: int, full_verbs: bool | None = None) -> Layout:
        """Return the layout of observations of a length; the number of models follows from it.

        Args:
            observation_size: Their length.
            full_verbs: Of which verb set; the policy's, or the full one where it has both.

        Raises:
            ValueError: No number of models gives that length.
        """
        if full_verbs is None:
            full_verbs = self.full_verbs
        prior = self.rule is not None
        per_model = N_MODEL + prior * len(verb_names(full_verbs))
        models, rest = divmod(observation_size - N_GLOBAL - prior, per_model)
        if rest or models < 1:
            raise ValueError(f"an observation cannot have {observation_size} numbers")
        return Layout(models, full_verbs, prior)

    def logits(self, observations: Floats) -> Floats:
        """Return the logits of all actions, float32[..., A], not masked.

        Args:
            observations: float32[..., D], all of one verb set; the rule's suggestion included,
                one-hot over the actions, where the policy has a prior.
        """
        size = observations.shape[-1]
        obs = np.asarray(observations, np.float32).reshape(-1, size)
        full_verbs = self.full_verbs and (self.card.verb_set == "full" or bool(obs[0, FULL] > 0))
        layout = self.layout(size, full_verbs)
        # Of a policy with all verbs, those of the verb set.
        own: Any = slice(None)
        if self.full_verbs and not full_verbs:
            own = list(CORE_VERBS)
        node, models = obs[:, :N_GLOBAL], obs[:, N_GLOBAL : layout.public_size]
        models = models.reshape(len(obs), layout.max_models, N_MODEL)
        present = (models[:, :, PRESENT : PRESENT + 1] > 0).astype(np.float32)
        hidden = self._linear("encoder.model", models)
        hidden += self._linear("encoder.node", node)[:, None]
        suggestion = obs[:, layout.public_size :]
        if layout.suggestion:
            verbs = suggestion[:, 1:].reshape(len(obs), layout.max_models, len(layout.verbs))
            hidden += verbs @ self.weights["encoder.extra.weight"][:, own].T
        embedding = _relu(self._linear("encoder.second", _relu(hidden))) * present
        mean = embedding.sum(1) / np.maximum(1.0, present.sum(1))
        pooled = np.concatenate((mean, embedding.max(1), node), axis=1)
        context = _relu(self._linear("encoder.context", pooled))
        hidden = self._linear("head", embedding)
        hidden += self._linear("head_context", context)[:, None]
        logits = np.empty((len(obs), layout.num_actions), np.float32)
        logits[:, :1] = self._linear("wait", context)
        by_verb = _relu(hidden) @ self.weights["verbs.weight"][own].T
        by_verb += self.weights["verbs.bias"][own]
        by_verb[:, :, self._banned[own]] = IMPOSSIBLE
        logits[:, 1:] = by_verb.reshape(len(obs), -1)
        if layout.suggestion:
            logits += self.weights["beta"][int(full_verbs)] * suggestion
        return logits.reshape(*observations.shape[:-1], -1)

    def _linear(self, name: str, x: Floats) -> Floats:
        y: Floats = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        if bias is not None:
            y += bias
        return y

    def act(self, observations: Floats, masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """Return the most probable legal actions, int64[...].

        Args:
            observations: float32[..., D].
            masks: bool[..., A], True is legal; WAIT always is.
        """
        logits = np.where(masks, self.logits(observations), -np.inf)
        return np.asarray(logits.argmax(axis=-1), np.int64)

    def probabilities(self, observations: Floats, masks: npt.NDArray[np.bool_]) -> Floats:
        """Return the probabilities of all actions, float32[..., A]; 0 for those not legal."""
        logits = np.where(masks, self.logits(observations), -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True), np.float32)


def _relu(x: Floats) -> Floats:
    return np.maximum(x, 0, out=x)


def save_policy(folder: Path, card: PolicyCard, weights: dict[str, Floats]) -> None:
    """Write a policy's two files into a folder, each whole or not at all.

    Raises:
        InputError: The folder cannot be written.
        MmrlError: The disk is full.
    """
    from safetensors.numpy import save

    with atomic_write(folder / WEIGHTS, "wb") as file:
        file.write(save({name: np.array(w, order="C") for name, w in weights.items()}))
    write_json(folder / DESCRIPTION, card.model_dump())


def load_policy(path: str | Path) -> ExportedPolicy:
    """Read a policy.

    Args:
        path: Its folder, the folder of a run, whose best policy is taken, or ``default`` for the
            one that is shipped.

    Raises:
        InputError: There is no policy, its files are damaged or hold NaN, or it was made for
            other features, verbs or another version of the format.
    """
    folder = Path(path)
    if str(path) == DEFAULT:
        folder = DEFAULT_FOLDER
        if not (folder / DESCRIPTION).is_file():
            raise InputError(
                "no default policy is shipped with this version",
                "train one (mmrl train universal --verbs both) and name its folder",
            )
    if not (folder / DESCRIPTION).is_file() and (folder / BEST).is_dir():
        folder = folder / BEST
    card = _read_card(folder / DESCRIPTION)
    return ExportedPolicy(card, _read_weights(folder / WEIGHTS, card), str(path))


def policy_hash(folder: Path) -> str:
    """Return the SHA-256 of an exported policy: of its description, then of its weights."""
    place = DEFAULT_FOLDER if str(folder) == DEFAULT else folder
    return files_hash([place / name for name in (DESCRIPTION, WEIGHTS)])


def _read_card(path: Path) -> PolicyCard:
    import json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {reason}", "name a policy or run folder") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}", "export the policy again") from error
    version = data.get("format") if isinstance(data, dict) else None
    if version != FORMAT:
        raise InputError(
            f"{path}: format is {version!r}, this version reads {FORMAT}",
            "train again, or use the version of mmrl that wrote it",
        )
    try:
        card = PolicyCard.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path}: {first_error(error)}") from None
    expected = {
        "global_features": GLOBAL_FEATURES,
        "model_features": MODEL_FEATURES,
        "verbs": verb_names(card.verb_set != "core"),
    }
    for field, names in expected.items():
        _check_names(path, field, getattr(card, field), names)
    return card


def _check_names(path: Path, field: str, found: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if found == expected:
        return
    lost = [name for name in found if name not in expected]
    new = [name for name in expected if name not in found]
    what = f"{lost[0]!r} is not known" if lost else f"{new[0]!r} is missing" if new else "order"
    raise InputError(
        f"{path}: {field} differ from those of this version: {what}",
        "train again, or use the version of mmrl that wrote it",
    )


def _read_weights(path: Path, card: PolicyCard) -> dict[str, Floats]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        weights = load(path.read_bytes())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {reason}", "export the policy again") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error}", "export the policy again") from error
    remedy = "export the policy again"
    for name, shape in card.shapes().items():
        if name not in weights:
            raise InputError(f"{path}: tensor '{name}' is missing", remedy)
        tensor = weights[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise InputError(
                f"{path}: tensor '{name}' is {tensor.dtype}{list(tensor.shape)}, "
                f"not float32{list(shape)}",
                remedy,
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{path}: tensor '{name}' holds NaN or infinity", remedy)
    return {name: weights[name] for name in card.shapes()}
