"""Prompts read with x in 8 bits: which weights do so where, and what is read and written then."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.bench.operands import weight_like
from qjax.errors import GenerationError
from qjax.models import generate
from qjax.models.generate import prefill
from qjax.models.prefill import for_prompts
from qjax.qtensor import QTensor
from xla_ffi.cpu import library

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("device", "scheme", "reads"),
    [
        ("h200", "w8a16", "w8a8_int8"),
        ("h200", "fp8:granularity=tensor", "w8a8_fp8:granularity=tensor"),
        ("h200", "fp8:granularity=block", "w8a8_fp8:granularity=block,activation=block"),
        ("h200", "w4a16", "w4a8_int8:group_size=128"),
        ("h200", "w4a16:symmetric=false", "w4a16:group_size=128,symmetric=false"),  # no kernel multiplies it by int8
        ("a100", "w4a16", "w4a16:group_size=128"),
        ("h200", "nf4", "nf4"),
        ("h200", "w8a8_int8", "w8a8_int8"),
        ("a100", "fp8", "fp8"),  # its tensor cores have no FP8
        ("a100", "w8a16", "w8a8_int8"),
    ],
)
def test_a_weight_reads_prompts_in_8_bits_where_a_kernel_multiplies_them(device, scheme, reads):
    w = weight_like(qjax.parse_scheme(scheme), 4096, 4096)
    with qjax.use(device=device):
        found = for_prompts({"w": w, "bias": jnp.ones(3)}, 512, jnp.bfloat16)
    assert str(found["w"].scheme) == reads
    assert found["w"].packed is w.packed


def test_a_backend_that_was_asked_for_and_has_no_such_kernel_keeps_x_as_it_is():
    w = weight_like(qjax.parse_scheme("fp8"), 4096, 4096)
    with qjax.use(device="h200", backend="xla"):
        assert for_prompts([w], 512, jnp.bfloat16)[0].scheme == w.scheme


@pytest.mark.skipif(library.missing() is not None, reason="the kernels of CPUs are not built: make setup")
def test_prompts_are_read_as_the_twin_scheme_reads_them_and_text_is_written_as_before(pylm_folder):
    weights, twin = (qjax.nnx.quantize(qjax.load(pylm_folder), scheme) for scheme in ("w8a16", "w8a8_int8"))
    definition, state = nnx.split(weights)
    ids, positions = np.array([PROMPTS[0]], np.int32), np.arange(7, dtype=np.int32)[None]
    _, cache = prefill(definition, for_prompts(state, 7, jnp.float32), ids, positions, None, capacity=16)
    for other, is_same in ((twin, True), (weights, False)):
        _, expected = prefill(*nnx.split(other), ids, positions, None, capacity=16)
        apart = [
            np.abs(np.asarray(a) - b).max()
            for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True)
        ]
        assert (max(apart) < 1e-4) == is_same
    rows = generate(weights, PROMPTS, max_new_tokens=12, prompt_activations="8bit")
    assert [len(row) for row in rows] == [12, 12]
    kept = [
        w.scheme
        for w in jax.tree.leaves(nnx.state(weights), is_leaf=lambda a: isinstance(a, QTensor))
        if isinstance(w, QTensor)
    ]
    assert set(map(str, kept)) == {"w8a16"}


def test_other_ways_are_refused(small):
    with pytest.raises(GenerationError, match="prompt_activations='int8'; allowed: scheme, 8bit"):
        generate(small, [[1]], max_new_tokens=1, prompt_activations="int8")
