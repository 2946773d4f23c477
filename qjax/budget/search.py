"""`search`: a model, batches and a budget -> which layer gets which scheme."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.budget.mixture import Mixture
from qjax.budget.sensitivity import NEAREST, Distance, Survey, mean_kl
from qjax.calibration.model import check_batches, subject_of
from qjax.calibration.recipe import Recipe, as_recipe
from qjax.errors import CalibrationError
from qjax.rules import EVERYTHING, Rule
from qjax.schemes import Scheme, as_scheme

# Integers of every width, with zero points where these are worth their bytes.
INTEGERS = (
    "w2a16:group_size=32",
    "w3a16",
    "w3a16:group_size=64",
    "w4a16:symmetric=false",
    "w4a16:group_size=64,symmetric=false",
    "w4a16:group_size=32,symmetric=false",
    "w5a16:symmetric=false",
    "w6a16:symmetric=false",
    "w8a16",
)
CANDIDATES = (*INTEGERS, "nf4:double_quant=true")


def search(
    model: Any,
    batches: Iterable[Any],
    *,
    budget_bits: float | None = None,
    budget_bytes: int | None = None,
    candidates: Sequence[Scheme | str | None] | None = None,
    layers: str | Sequence[str] = EVERYTHING,
    together: Sequence[str] = (),
    recipe: Recipe | str | None = None,
    distance: Distance = mean_kl,
    params: Any = None,
    partial_groups: bool = False,
    progress: bool | None = None,
    **apply_options: Any,
) -> Mixture:
    """Finds which layer should get which scheme, for the least loss within a budget.

    Every candidate is tried in every layer by itself, on what enters it in the float model; the model as a whole is run
    on all batches once for each layer. The choice among them is a multiple-choice knapsack, solved to within 0.01 % of
    the best by SciPy's HiGHS. The model is not changed.

    Args:
      model: a linen module or an nnx module; what it puts out are logits, unless `distance` knows better.
      batches: of one shape, as of `qjax.calibrate`; a few thousand tokens suffice.
      budget_bits: bits a weight on average, scales and padding counted; or
      budget_bytes: bytes of the searched layers' kernels together.
      candidates: schemes or their strings, None in their place to leave a layer as it is; by default `CANDIDATES`, of
        which recipes take the `INTEGERS`. One that does not fit a layer is not among its options.
      layers: regexes over paths as in rules; those that match none are left alone, and are no part of the budget.
      together: regexes over the last part of a path. Layers of one parent that match the same one get one scheme, as
        q, k and v must to be merged: `"[qkv]_proj"`.
      recipe: how layers will be quantized; by default to nearest. One that moves factors between layers, or that aims
        at the float model's outputs, cannot be tried in layers by themselves.
      distance: `(output of the float model, output) -> scalar`, jittable; 0 where they are the same.
      params: of a linen module, as of `qjax.quantize`.
      partial_groups: allow a short last group where the group size does not divide K.
      progress: True, False, or None for a bar on a terminal when the work takes longer than two seconds.
      **apply_options: further arguments of a linen model's `apply`.

    Returns:
      The choice; `qjax.nnx.quantize(model, found.rules)` follows it, `found.within` makes another for another budget.

    Raises:
      CalibrationError: no budget or two, one below the least that candidates reach (which is said), no batch, batches
        of several shapes, a layer that no batch reaches, NaN or inf in what enters one, a recipe that cannot be tried.
      QuantizeError: a layer that no candidate fits.
      RuleError: a pattern that matches no layer.
      NotImplementedError: as of `qjax.calibrate`.
    """
    if (budget_bits is None) == (budget_bytes is None):
        raise CalibrationError(f"give one of budget_bits and budget_bytes; got {budget_bits=}, {budget_bytes=}")
    parsed = _lone(recipe)
    if candidates is None:
        candidates = CANDIDATES if parsed is NEAREST else INTEGERS
    schemes = tuple(dict.fromkeys(None if one is None else as_scheme(one) for one in candidates))
    quantized = [one for one in schemes if one is not None]
    if not quantized:
        raise CalibrationError(f"candidates are schemes, at least one; got {list(candidates)}")
    given = check_batches(batches)
    if not given:
        raise CalibrationError("a search looks at what enters layers: give at least one batch, got none")
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    rules = tuple(Rule(pattern, quantized[0], partial_groups=partial_groups) for pattern in patterns)
    subject = subject_of(model, params, rules, given, apply_options)
    _check_output(jax.eval_shape(subject.call, subject.leaves, given[0]), distance)
    found = Survey(subject, schemes, parsed, partial_groups).run(given, distance, progress)
    return Mixture(tuple(found), 0, tuple(together), partial_groups).within(bits=budget_bits, nbytes=budget_bytes)


def _lone(recipe: Recipe | str | None) -> Recipe:
    """A recipe that can be tried in a layer by itself."""
    found = NEAREST if recipe is None else as_recipe(recipe)
    if found.scaling is not None or found.outputs == "float":
        raise CalibrationError(f"recipe {found} is of more than one layer: search with another, calibrate with this")
    return found


def _check_output(output: Any, distance: Distance) -> None:
    """`mean_kl` is of logits."""
    is_logits = isinstance(output, jax.ShapeDtypeStruct) and jnp.issubdtype(output.dtype, jnp.floating) and output.ndim
    if distance is mean_kl and not is_logits:
        raise CalibrationError(f"the model puts out {jax.tree.structure(output)}, no logits: give distance=")
