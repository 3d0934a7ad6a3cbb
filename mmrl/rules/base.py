"""`Rule`: a hand-written policy as a pydantic model of its parameters.

A rule decides from the state of a node alone, in compiled code: ``suggest`` of its module takes the
node, its requests, the cost tables and the parameters as a vector and returns one action, and is
asked again at the same instant until it says WAIT. ``mmrl.rules.dispatch`` calls it by number.
"""

from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from mmrl.node.state import DISPATCHES, Nodes, Record

MAX_PARAMS = 9


def tunable(default: float, low: float, high: float, *, log: bool = False, unit: str = "") -> Any:
    """Declare a parameter of a rule with the bounds between which it is valid and tuned.

    Args:
        default: Its value where nothing was tuned.
        low: Lowest value.
        high: Highest value.
        log: Search on a logarithmic scale.
        unit: What it counts, ``"s"`` for example; empty for a pure number.
    """
    return Field(default=default, ge=low, le=high, json_schema_extra={"log": log, "unit": unit})


class Rule(BaseModel):
    """Base of all rules: parameters in the order of their declaration, and the dispatch rule.

    Attributes:
        name: Name of the rule.
        number: Its number in ``mmrl.rules.dispatch.suggest``.
        dispatch: Who gets the device next under this rule; None leaves the scenario's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: ClassVar[str]
    number: ClassVar[int]

    dispatch: Literal["rr", "edf", "las"] | None = None

    @classmethod
    def tunables(cls) -> tuple[str, ...]:
        """Return the names of the numeric parameters, in the order of ``params``."""
        return tuple(field for field in cls.model_fields if field != "dispatch")

    @property
    def params(self) -> npt.NDArray[np.float64]:
        """The parameters as compiled code reads them, float64[MAX_PARAMS], zeros at the end."""
        values = [float(getattr(self, field)) for field in self.tunables()]
        return np.array(values + [0.0] * (MAX_PARAMS - len(values)))

    def prepare(self, nodes: Nodes | Record) -> None:
        """Set the dispatch rule of a node, or of several, after its reset."""
        if self.dispatch is not None:
            nodes["dispatch"] = DISPATCHES.index(self.dispatch)
