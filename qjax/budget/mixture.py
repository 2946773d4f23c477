"""Mixture: a scheme for each layer, what that weighs and is expected to lose, and how it was weighed up."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qjax.budget.knapsack import choose, frontier
from qjax.errors import CalibrationError
from qjax.rules import Rule
from qjax.schemes import Scheme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Option:
    """What a layer may become.

    Attributes:
      scheme: None leaves it float.
      nbytes: of the kernel then.
      error: `tr((W - W') H (W - W')')`, the mean square error of its outputs, summed over them.
      loss: what that is expected to cost the model.
    """

    scheme: Scheme | None
    nbytes: int
    error: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """A layer and its options. `slope` is the loss per unit of error, as measured; `size` the number of weights."""

    path: str
    size: int
    slope: float
    options: tuple[Option, ...]


@dataclasses.dataclass(frozen=True)
class Point:
    """A choice for all layers: its name, bytes, bits a weight and expected loss."""

    name: str
    nbytes: int
    bits: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A scheme for each layer.

    Attributes:
      layers: with what was measured of them.
      budget: in bytes.
      together: regexes over the last part of a path: layers of one parent that match the same one share a scheme.
      partial_groups: as rules have it.
    """

    layers: tuple[Sensitivity, ...]
    budget: int
    together: tuple[str, ...] = ()
    partial_groups: bool = False

    @functools.cached_property
    def choice(self) -> tuple[Option, ...]:
        """The option of each layer."""
        return self._within(self.budget)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """For `qjax.quantize`, `qjax.nnx.quantize` and `qjax.calibrate`: one for each layer."""
        pairs = zip(self.layers, self.choice, strict=True)
        return tuple(
            Rule(re.escape(layer.path), one.scheme, partial_groups=self.partial_groups and one.scheme is not None)
            for layer, one in pairs
        )

    @property
    def text(self) -> str:
        """The rules as lines that `qjax quantize --rules` reads."""
        return "".join(f"{rule.pattern} {rule.scheme or 'none'}\n" for rule in self.rules)

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(layer.size for layer in self.layers)

    @property
    def point(self) -> Point:
        """All of it together."""
        return self._point("found", self.choice)

    @property
    def nbytes(self) -> int:
        """Of all kernels."""
        return self.point.nbytes

    @property
    def bits(self) -> float:
        """A weight."""
        return self.point.bits

    def within(self, *, bits: float | None = None, nbytes: int | None = None) -> "Mixture":
        """The best choice for another budget, from the same measurements.

        Raises:
          CalibrationError: a budget below the least that there is, or none, or two.
        """
        if (bits is None) == (nbytes is None):
            raise CalibrationError(f"a budget is in bits a weight or in bytes; got {bits=}, {nbytes=}")
        given = bits if bits is not None else nbytes
        if given is None or not math.isfinite(given):
            raise CalibrationError(f"a budget is a finite number; got {bits=}, {nbytes=}")
        budget = int(given if bits is None else bits * self.size / 8)
        least = sum(min(sizes) for _, sizes in map(self._table, self._groups()))
        if budget < least:
            raise CalibrationError(
                f"a budget of {budget:,} bytes ({8 * budget / self.size:.3f} bits a weight) is below the least that "
                f"candidates reach: {least:,} bytes ({8 * least / self.size:.3f} bits)"
            )
        return dataclasses.replace(self, budget=budget)

    def uniform(self) -> list[Point]:
        """The same scheme for every layer, where all have it among their options."""
        found = []
        for scheme in dict.fromkeys(one.scheme for one in self.layers[0].options):
            ones = [next((one for one in layer.options if one.scheme == scheme), None) for layer in self.layers]
            known = tuple(one for one in ones if one is not None)
            if len(known) == len(ones):
                found.append(self._point(str(scheme or "float"), known))
        return found

    def front(self) -> list[Point]:
        """The best for budgets from the least to the most: what is lost against what it weighs."""
        costs, sizes = zip(*map(self._table, self._groups()), strict=True)
        return [Point("mixed", at, 8 * at / self.size, loss) for at, loss in frontier(costs, sizes)]

    def plot(self) -> "Figure":
        """The front, the uniform schemes and what was found, as a figure."""
        from qjax.budget.plot import plot_front

        return plot_front(self)

    def to_json(self) -> dict[str, Any]:
        """Everything as what `json` writes."""
        pairs = zip(self.layers, self.choice, strict=True)
        return {
            "budget": self.budget,
            "found": dataclasses.asdict(self.point),
            "uniform": [dataclasses.asdict(point) for point in self.uniform()],
            "front": [dataclasses.asdict(point) for point in self.front()],
            "layers": [
                {
                    "path": layer.path,
                    "size": layer.size,
                    "slope": layer.slope,
                    "scheme": _name(chosen),
                    "options": [
                        {"scheme": _name(one), "nbytes": one.nbytes, "error": one.error, "loss": one.loss}
                        for one in layer.options
                    ],
                }
                for layer, chosen in pairs
            ],
        }

    def _groups(self) -> list[list[int]]:
        """Layers that share a scheme."""
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, layer in enumerate(self.layers):
            parent, _, name = layer.path.rpartition("/")
            shared = next((pattern for pattern in self.together if re.fullmatch(pattern, name)), None)
            groups[(number,) if shared is None else (parent, shared)].append(number)
        return list(groups.values())

    def _shared(self, group: list[int]) -> Iterator[list[Option]]:
        """The options that all layers of a group have, one of each layer."""
        for scheme in dict.fromkeys(one.scheme for one in self.layers[group[0]].options):
            ones = [one for i in group for one in self.layers[i].options if one.scheme == scheme]
            if len(ones) == len(group):
                yield ones

    def _table(self, group: list[int]) -> tuple[list[float], list[int]]:
        """Costs and sizes of what a group may become."""
        options = list(self._shared(group))
        if not options:
            names = ", ".join(self.layers[i].path for i in group)
            raise CalibrationError(f"{names}: no candidate fits all of these, which are to have one together")
        losses = [sum(one.loss for one in ones) for ones in options]
        return losses, [sum(one.nbytes for one in ones) for ones in options]

    def _within(self, budget: int) -> tuple[Option, ...]:
        groups = self._groups()
        costs, sizes = zip(*map(self._table, groups), strict=True)
        found: dict[int, Option] = {}
        for group, which in zip(groups, choose(costs, sizes, budget), strict=True):
            found |= zip(group, list(self._shared(group))[which], strict=True)
        return tuple(found[i] for i in range(len(self.layers)))

    def _point(self, name: str, options: tuple[Option, ...]) -> Point:
        nbytes = sum(one.nbytes for one in options)
        return Point(name, nbytes, 8 * nbytes / self.size, sum(one.loss for one in options))


def _name(option: Option) -> str | None:
    return None if option.scheme is None else str(option.scheme)
