"""What an engine serves: models with everything that runs them, and the requests in the node."""

from dataclasses import dataclass

from mmrl.deploy.kv import KVPool
from mmrl.deploy.protocol import Generate
from mmrl.deploy.runner import ModelRunner
from mmrl.deploy.sampling import Choice
from mmrl.deploy.weights import ModelWeights


@dataclass(eq=False)
class ServedModel:
    """A model with everything that runs it.

    Attributes:
        name: What clients call it.
        weights: Its weights on host and device.
        pool: Its KV blocks.
        runner: Its iterations.
        eos: Its end-of-sequence tokens.
        failures: Failed iterations in a row.
        quarantined: Whether it takes no requests.
    """

    name: str
    weights: ModelWeights
    pool: KVPool
    runner: ModelRunner
    eos: frozenset[int]
    failures: int = 0
    quarantined: bool = False


@dataclass(eq=False)
class Sequence_:
    """A request that is in the node.

    Attributes:
        number: The front's number of the request, also the key of its KV.
        request: What was asked for.
        model: Index of its model.
        row: Its row in the node's table.
        tokens: Prompt and tokens generated so far.
        seed: Of its sampling.
        ending: Its last token has come, or an error: nothing is emitted any more.
    """

    number: int
    request: Generate
    model: int
    row: int
    tokens: list[int]
    seed: int
    ending: bool = False

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    def choice(self, later: int = 0) -> Choice:
        """Return how its next token is chosen, or the one so many steps later."""
        request = self.request
        no_eos = self.generated + later < request.min_tokens and not request.ignore_eos
        return Choice.of(request.sampling, self.seed, no_eos)


Rows = dict[int, Sequence_]  # the requests by their row in the node's table
