"""200 greedy tokens of the real model in each scheme are those that float32 with the same weights chooses step by step.

The reference is dense: the dequantized weights in `nnx.Linear`s, the whole text before a token, no cache. Where x is
quantized too it is the quantized model itself, by the `xla` reference. One forward pass gives the choices of all steps.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.models import Llama, generate, merge
from qjax.nnx import QLinear

pytestmark = pytest.mark.slow

STEPS = 200
SCHEMES = (
    "w8a16", "w6a16:group_size=64", "w5a16:symmetric=false", "w4a16", "w4a16:group_size=32,symmetric=false", "w3a16",
    "w2a16", "fp8", "fp8:granularity=block", "nf4:double_quant=true", "fp4", "mxfp4", "mxfp8", "nvfp4",
    "w8a8_int8", "w4a8_int8:group_size=32", "w8a8_fp8",
)  # fmt: skip
forward = nnx.jit(lambda model, ids: model(ids))


def dense(model: Llama) -> Llama:
    """With the dequantized weights, in place."""
    for _, parent in list(nnx.iter_modules(model)):
        for name, module in list(vars(parent).items()):
            if isinstance(module, QLinear):
                kernel = module.kernel.get_value().dequantize(jnp.float32)
                linear = nnx.eval_shape(lambda k=kernel: nnx.Linear(*k.shape, use_bias=False, rngs=nnx.Rngs(0)))
                linear.kernel.set_value(kernel)
                setattr(parent, name, linear)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_greedy_tokens_are_the_references_but_for_ties(scheme, pylm_folder, reference):
    prompt = reference["prompt0_ids"].tolist()
    made = [qjax.nnx.quantize(qjax.load(pylm_folder, dtype=jnp.float32), scheme) for _ in range(2)]
    (written,) = generate(merge(made[0]), [prompt], max_new_tokens=STEPS)
    assert len(written) == STEPS
    whole = jnp.asarray([prompt + written[:-1]])
    activation = qjax.parse_scheme(scheme).activation
    with qjax.use(backend="xla"):
        logits = np.asarray(forward(dense(made[1]) if activation is None else made[1], whole))[0, len(prompt) - 1 :]
    chosen = np.take_along_axis(logits, np.array(written)[:, None], axis=1)[:, 0]
    largest = logits.max(axis=1)
    # What rounding to bfloat16 may move a logit by. A code of x that falls to its other side moves it more: those of
    # e4m3 lie up to 6 % apart, and the reference itself differs that much between a text and its beginning.
    coarse = activation is not None and activation.format == "e4m3"
    tie = (2.0**-6 if coarse else 2.0**-8) * np.abs(largest)
    assert (largest - chosen <= tie).all(), np.flatnonzero(largest - chosen > tie)
    assert np.mean(chosen == largest) > 0.95
