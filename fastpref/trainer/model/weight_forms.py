"""What a head computes of its weight alone: once, for every pass until the weight changes.

Dims: V rows of a weight, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Form = TypeVar("Form")


class WeightForms:
    """What was computed of one weight: the sum over its rows, its int8 form.

    Nobody can tell from a tensor that it was written to (optimizers write through `.data`), so what is computed lives
    as long as one run of the schedule: the optimizer comes after it, and `forget` ends it whichever way it ends. Only
    what is of a frozen weight stays, and everything while `is_at_rest` says that nobody writes. It is computed at the
    first use, when an overlapped gather of the parameters has delivered the weight.
    """

    def __init__(self) -> None:
        self.is_at_rest = False
        self._weight: Tensor | None = None
        self._version = self._num_rows = 0
        self._made: dict[Callable[[Tensor], Any], Any] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> WeightForms:
        """Those of a copied model: another weight."""
        return WeightForms()

    def get(self, compute: Callable[[Tensor], Form], weight_VH: Tensor, num_rows: int) -> Form:
        """Returns what `compute` makes of the first `num_rows` rows."""
        if weight_VH is not self._weight or (weight_VH._version, num_rows) != (self._version, self._num_rows):
            self._made.clear()
            self._weight, self._version, self._num_rows = weight_VH, weight_VH._version, num_rows
        if compute not in self._made:
            self._made[compute] = compute(weight_VH[:num_rows])
        return self._made[compute]

    def forget(self) -> None:
        """Lets go of everything, as the weight may change; not where it is frozen or at rest."""
        is_frozen = self._weight is not None and not self._weight.requires_grad
        if not (is_frozen or self.is_at_rest):
            self._made.clear()
            self._weight = None
