"""Recipe: how a weight and what enters its layer become codes. The named constructors are the API.

`W` is a matrix `[N, K]`, `X` `[T, K]` what enters its layer behind those that are quantized already, `H = X'X / T`; `Q`
rounds to the grid of the scheme. On the command line a recipe is its constructor's key in `RECIPES` with its options:
`gptq:order=static,passes=4`.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

from qjax.errors import CalibrationError
from qjax.spec import read_spec, write_spec

Order = Literal["act", "static", "natural"]
Outputs = Literal["own", "float"]

SHRINKS = 24  # shorter ranges that a clip search tries


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Factors that columns of W are multiplied by before rounding, and x divided by.

    Attributes:
      search: "awq" or "smoothquant".
      strength: SmoothQuant's exponent.
      unfolded: where nothing before the layer can take the factors up: "keep" them as the QTensor's `input_scale`, or
        "skip" the layer.
      linears: whether linears can, besides norms.
    """

    search: Literal["awq", "smoothquant"]
    strength: float = 0.5
    unfolded: Literal["keep", "skip"] = "keep"
    linears: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to each layer; made by the constructors below.

    Attributes:
      spec: the string that makes it.
      rounding: to the "nearest" code; by "gptq", the columns after a rounded one making up for it; by "hqq", to the
        nearest with real zero points.
      order: of columns in "gptq": "act" is by falling `H_jj` with groups of that order, "static" the same with groups
        as they lie in W, "natural" that of W.
      shrinks: shorter ranges that are tried for the scale of each group.
      damping: added to the diagonal of H, as a share of its mean.
      passes: of coordinate descent after rounding.
      outputs: what a layer should put out: what its float weight makes of its "own" input, or what it puts out in the
        "float" model.
      scaling: of columns, before rounding.
    """

    spec: str
    rounding: Literal["nearest", "gptq", "hqq"] = "nearest"
    order: Order = "natural"
    shrinks: int = 0
    damping: float = 0.01
    passes: int = 0
    outputs: Outputs = "own"
    scaling: Scaling | None = None

    @property
    def needs_data(self) -> bool:
        """Whether batches are run."""
        return self.rounding == "gptq" or self.scaling is not None

    def __str__(self) -> str:
        return self.spec


def _one_of(name: str, option: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise CalibrationError(f"{name}: {option}={value!r}; allowed: {', '.join(map(str, allowed))}")


def _number(name: str, option: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CalibrationError(f"{name}: {option}={value!r}; allowed: a number from {low:g} to {high:g}")
    return value


def Nearest() -> Recipe:
    """Rounding to nearest, as `qjax.quantize` does it: for schemes of which only the scales of x take data."""
    return Recipe("nearest")


def MSE() -> Recipe:
    """Rounding to nearest with the range of each group chosen for the least squared error; no data.

    `s = argmin_s |w - Q_s(w)|^2` over the whole range of the group and shares of it down to 0.4. Source: as GPTQ's
    and AWQ's clip searches, without their weights.
    """
    return Recipe("mse", shrinks=SHRINKS)


def GPTQ(
    order: Order = "act",
    clip: bool = True,
    damping: float = 0.01,
    passes: int = 0,
    outputs: Outputs = "own",
) -> Recipe:
    """GPTQ: columns are rounded one after another, those left making up for the error.

    With `U'U = (H + d I)^-1`, U upper triangular, and column j rounded: `e = (w_j - Q(w_j)) / U_jj`,
    `w_l -= e U_jl` for l > j. Source: Frantar et al., GPTQ (2023); orders "act" and "static" as in AutoGPTQ.

    Args:
      order: "act": columns by falling `H_jj`, groups of that order, and the QTensor has an `input_perm`; "static": the
        same columns, groups as they lie; "natural".
      clip: each group's scale is the best of shorter ranges too, errors weighted by `1 / U_jj^2`; the paper has none.
      damping: d as a share of the mean of H's diagonal; raised tenfold, and reported, where H stays singular.
      passes: of coordinate descent over scales, zero points and codes afterwards (Behdin et al., QuantEase, 2023; Zhang
        et al., COMQ, 2024).
      outputs: "float" aims at what the layer puts out in the float model, W being replaced by
        `argmin_V |X V' - Y W'|^2 + d |V - W|^2`, Y what enters there (Li et al., GPTAQ, 2025); twice the work.
    """
    _one_of("gptq", "order", order, get_args(Order))
    _one_of("gptq", "clip", clip, (True, False))
    _one_of("gptq", "outputs", outputs, get_args(Outputs))
    _number("gptq", "damping", damping, 0, 1)
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 0:
        raise CalibrationError(f"gptq: passes={passes!r}; allowed: 0 or a positive integer")
    given = dict(order=order, clip=clip, damping=damping, passes=passes, outputs=outputs)
    shrinks = SHRINKS if clip else 0
    return Recipe(write_spec("gptq", RECIPES, given), "gptq", order, shrinks, damping, passes, outputs)


def AWQ(
    clip: bool = True, rounding: Literal["nearest", "gptq"] = "nearest", unfolded: Literal["keep", "skip"] = "keep"
) -> Recipe:
    """AWQ: columns that meet large activations are scaled up before rounding.

    `s = m^a / sqrt(max(m^a) min(m^a))` with `m_j = mean |x_j|`, a of 0, 0.05, ..., 0.95 chosen for the least
    `tr((W - W') H (W - W')')` of all layers that share the input, `W' = Q(W s) / s`. The norm before the layer takes
    `1 / s` up where it feeds nothing else, else the scales of a linear before it (up before down, v before o; m is the
    mean over queries that share a value). Source: Lin et al., AWQ (2024).

    Args:
      clip: choose each group's range by a search, its errors weighted by `H_jj`.
      rounding: "gptq" rounds the scaled weight as `GPTQ(order="static")` does.
      unfolded: where there is no such norm or linear, "keep" the factors as `input_scale`, or "skip" them.
    """
    _one_of("awq", "clip", clip, (True, False))
    _one_of("awq", "rounding", rounding, ("nearest", "gptq"))
    _one_of("awq", "unfolded", unfolded, ("keep", "skip"))
    spec = write_spec("awq", RECIPES, dict(clip=clip, rounding=rounding, unfolded=unfolded))
    order: Order = "static" if rounding == "gptq" else "natural"
    return Recipe(spec, rounding, order, SHRINKS if clip else 0, scaling=Scaling("awq", unfolded=unfolded))


def SmoothQuant(strength: float = 0.5, unfolded: Literal["keep", "skip"] = "skip") -> Recipe:
    """SmoothQuant, for schemes that quantize x: outliers of x are moved into the weight.

    `s_j = max |x_j|^a / max |w_j|^(1 - a)` over the layers that share the input; x is divided by s, W multiplied, and
    rounded to nearest. The norm before the layer takes `1 / s` up. Source: Xiao et al., SmoothQuant (2023).

    Args:
      strength: a.
      unfolded: "skip" layers behind no such norm, as the paper does; "keep" scales them too, into a linear before them
        where that can take `1 / s` up (the geometric mean where queries share a value), else as `AWQ`.
    """
    _number("smoothquant", "strength", strength, 0, 1)
    _one_of("smoothquant", "unfolded", unfolded, ("keep", "skip"))
    spec = write_spec("smoothquant", RECIPES, dict(strength=strength, unfolded=unfolded))
    return Recipe(spec, scaling=Scaling("smoothquant", strength, unfolded, linears=unfolded == "keep"))


def HQQ() -> Recipe:
    """HQQ: zero points that are real numbers, moved to where the error's 0.7-norm is small; no data.

    20 times: `E = shrink(W - W')` with `shrink(e) = sign(e) max(|e| - |e|^(p-1) / b, 0)`, `z = mean(q - (W - E) / s)`
    over the group; p = 0.7, b = 10, growing by 1.01. Source: Badri & Shaji, HQQ (2023).
    """
    return Recipe("hqq", "hqq")


RECIPES: dict[str, Callable[..., Recipe]] = {
    "nearest": Nearest,
    "mse": MSE,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "hqq": HQQ,
}


def parse_recipe(text: str) -> Recipe:
    """The recipe that a command line names: `gptq:order=static,passes=4`.

    Raises:
      CalibrationError: an unknown name or option, naming the known ones.
    """
    return read_spec(text, RECIPES, "recipe", CalibrationError)


def as_recipe(recipe: Recipe | str) -> Recipe:
    """A recipe from itself or its string.

    Raises:
      CalibrationError: for anything else.
    """
    if isinstance(recipe, str):
        return parse_recipe(recipe)
    if isinstance(recipe, Recipe):
        return recipe
    hint = "; call it" if callable(recipe) else ""
    raise CalibrationError(f"a recipe is a qjax.calibration.Recipe or its string; got {recipe!r}{hint}")
