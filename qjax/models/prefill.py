"""What reads prompts: the model's own weights, under schemes that quantize x where that makes many rows faster.

A prompt is bound by operations, and tensor cores multiply 8 bits by 8 bits twice as fast as 16 by 16; a token that
follows is bound by bytes, which x in 8 bits does not save. Codes and scales are the same arrays in both.
"""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from qjax.checkpoints.activations import as_stored
from qjax.dispatch.choose import choose
from qjax.errors import BackendError, GenerationError
from qjax.formats import FORMATS
from qjax.kernel_call import problem_of
from qjax.qtensor import QTensor
from qjax.schemes import Activation

CHOICES = ("scheme", "8bit")  # what `reader_of` takes

_TOKENS, _FP8_TOKENS = Activation("int8", "token"), Activation("e4m3", "token")
_ACTIVATIONS = {"int8": _TOKENS, "int4": _TOKENS, "e4m3": _FP8_TOKENS}  # by the weight's format
_BLOCKS = Activation("e4m3", "block")  # where the weight's scales are of blocks, too


def reader_of(state: nnx.State, activations: str, rows: int, dtype: Any) -> nnx.State:
    """The state that reads prompts: with "scheme" the state itself, with "8bit" that of `for_prompts`.

    Raises:
      GenerationError: other activations.
    """
    if activations not in CHOICES:
        raise GenerationError(f"prompt_activations={activations!r}; allowed: {', '.join(CHOICES)}")
    return state if activations == "scheme" else for_prompts(state, rows, dtype)


def for_prompts(state: nnx.State, rows: int, dtype: Any) -> nnx.State:
    """The state with x in 8 bits where a weight's scheme has a twin for that, which is expected to be faster.

    Args:
      state: of a model; its arrays are shared.
      rows: of x that a product meets: tokens of all prompts together.
      dtype: of activations.
    """
    twin = functools.partial(_faster, rows=rows, dtype=np.dtype(dtype))
    return jax.tree.map(twin, state, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _faster(w: Any, *, rows: int, dtype: np.dtype) -> Any:
    if not isinstance(w, QTensor) or w.scheme.activation is not None or w.scheme.weight not in _ACTIVATIONS:
        return w
    activation = _BLOCKS if w.scheme.block == (128, 128) else _ACTIVATIONS[w.scheme.weight]
    twin = as_stored(w, activation)
    if twin is None:
        return w
    try:
        as_it_is = choose(problem_of(w, m=rows, x_dtype=dtype))
        codes = choose(problem_of(twin, m=rows, x_dtype=FORMATS[activation.format].dtype, out_dtype=dtype))
    except BackendError:  # of the backend that was asked for
        return w
    multiplies_codes = codes.route.x_formats is not None and activation.format in codes.route.x_formats
    return twin if multiplies_codes and codes.estimate.seconds < as_it_is.estimate.seconds else w
