"""How the next token is chosen: greedily, or at random in a way that can be repeated.

A token is drawn by adding Gumbel noise to the scaled logits and taking the largest. The noise is
not a stream: it is computed from the request's seed, the position of the token and the number of
each vocabulary entry, by hashing. So a draw depends on nothing but these and its own logits: not on
who else is in the batch, not on a preemption in between, not on the machine (up to the rounding of
a logarithm).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mmrl.deploy.protocol import Sampling

PARAMETERS = 6  # numbers that a draw needs
_GREEDY_BELOW = 1e-5  # temperature
_ROWS_AT_ONCE = 16  # bounds the memory of a draw: a vocabulary of 256k takes about 100 MiB
_MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """How one token of one request is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: The smallest set of most likely tokens with at least this probability is kept.
        top_k: So many most likely tokens are kept, before top_p; 0 keeps all.
        seed: Of the request's noise.
        no_eos: No end-of-sequence token may be chosen.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    no_eos: bool = False

    @classmethod
    def of(cls, sampling: Sampling, seed: int, no_eos: bool = False) -> "Choice":
        """Return the choice for a request's parameters, with a seed in any case."""
        return cls(sampling.temperature, sampling.top_p, sampling.top_k, seed, no_eos)

    @property
    def greedy(self) -> bool:
        """Return whether the largest logit wins."""
        return self.temperature < _GREEDY_BELOW


def forbid(logits: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """Make tokens impossible in some rows, in place and without waiting for the device.

    Args:
        logits: ``[rows, vocabulary]``.
        tokens: Which tokens, int64 ``[n]``.
        rows: In which rows, bool ``[rows]``.
    """
    if not len(tokens):
        return
    kept = logits.index_select(1, tokens).masked_fill(rows[:, None], -torch.inf)
    logits.index_copy_(1, tokens, kept)


def choose(
    logits: torch.Tensor,
    choices: Sequence[Choice],
    positions: Sequence[int],
    send: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Choose a token for each row.

    Args:
        logits: ``[rows, vocabulary]``, of any floating type.
        choices: How, for each row. ``no_eos`` is not looked at, see `forbid`.
        positions: Position in its sequence of each token to be chosen.
        send: Brings float64 ``[drawn rows, PARAMETERS]`` from the host to the device of the
            logits; by default the usual copy.

    Returns:
        int64 ``[rows]``, on the device of the logits.
    """
    plain = [i for i, choice in enumerate(choices) if not choice.greedy and not _cuts(choice)]
    cut = [i for i, choice in enumerate(choices) if not choice.greedy and _cuts(choice)]
    drawn = plain + cut
    if len(drawn) == len(choices):
        chosen = torch.empty(len(choices), dtype=torch.int64, device=logits.device)
    else:
        chosen = logits.argmax(-1)
    if not drawn:
        return chosen
    parameters = _parameters(drawn, choices, positions, logits.shape[-1])
    there = parameters.to(logits.device) if send is None else send(parameters)
    for first, end, cuts in ((0, len(plain), False), (len(plain), len(drawn), True)):
        for begin in range(first, end, _ROWS_AT_ONCE):
            _draw(logits, chosen, there[begin : min(begin + _ROWS_AT_ONCE, end)], cuts)
    return chosen


def gumbel(keys: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the noise of each vocabulary entry.

    Args:
        keys: Two words per row, from `noise_key`, int32 ``[rows, 2]``.
        vocabulary: Number of entries.

    Returns:
        float32 ``[rows, vocabulary]``, Gumbel distributed.
    """
    entry = torch.arange(vocabulary, dtype=torch.int32, device=keys.device)
    word = _mix(_mix(entry[None, :] ^ keys[:, :1]) + keys[:, 1:])
    # The largest noise decides, and comes from the smallest uniform number: fine steps there.
    uniform = ((word & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24)))


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Return two 32-bit words, signed, that stand for a request's seed and a position."""
    word = _splitmix(_splitmix(seed & _MASK_64) + position)
    return _signed(word >> 32), _signed(word & 0xFFFFFFFF)


def _cuts(choice: Choice) -> bool:
    return choice.top_p < 1 or choice.top_k > 0


def _parameters(
    rows: Sequence[int], choices: Sequence[Choice], positions: Sequence[int], vocabulary: int
) -> torch.Tensor:
    """Return what the draws of some rows need, float64 ``[rows, PARAMETERS]``."""
    return torch.tensor(
        [
            (
                row,
                *noise_key(choices[row].seed, positions[row]),
                choices[row].temperature,
                choices[row].top_p,
                choices[row].top_k or vocabulary,
            )
            for row in rows
        ],
        dtype=torch.float64,  # holds 32-bit words exactly
    )


def _draw(logits: torch.Tensor, chosen: torch.Tensor, parameters: torch.Tensor, cuts: bool) -> None:
    """Draw the tokens of some rows into ``chosen``.

    Args:
        logits: ``[rows, vocabulary]``.
        chosen: int64 ``[rows]``.
        parameters: Of the rows to be drawn, from `_parameters`, on the device of the logits.
        cuts: Whether top_k or top_p leave tokens out.
    """
    vocabulary = logits.shape[-1]
    index = parameters[:, 0].long()
    noise = gumbel(parameters[:, 1:3].to(torch.int32), vocabulary)
    scores = logits.index_select(0, index).float()
    scores = (scores - scores.amax(-1, keepdim=True)) / parameters[:, 3:4].float()
    if cuts:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(vocabulary, device=logits.device)
        kept = rank < parameters[:, 5:6].long()
        # Whole numbers add up to the same sum in any order.
        weight = torch.where(kept, (scores.exp() * 2.0**30).long(), 0)
        before = weight.cumsum(-1) - weight
        enough = (weight.sum(-1, keepdim=True).double() * parameters[:, 4:5]).ceil().long()
        whole = parameters[:, 4:5] >= 1
        kept &= (before < enough) | whole | (rank == 0)
        scores = scores.masked_fill(~kept, -torch.inf) + noise.gather(-1, order)
        tokens = order.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)
    else:
        tokens = (scores + noise).argmax(-1)
    chosen.index_copy_(0, index, tokens)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """Hash int32 to int32, one to one (Wellons' lowbias32); shifts are logical."""
    word = word ^ ((word >> 16) & 0xFFFF)
    word = word * 0x7FEB352D
    word = word ^ ((word >> 15) & 0x1FFFF)
    word = word * _signed(0x846CA68B)
    return word ^ ((word >> 16) & 0xFFFF)


def _splitmix(word: int) -> int:
    """Hash 64 bits to 64 bits, one to one (Steele's splitmix64)."""
    word = (word + 0x9E3779B97F4A7C15) & _MASK_64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
