"""Random weights of every scheme are lawful ones, of a size and spread as in a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.bench.exact import columns_of, compare, rows_of
from qjax.bench.operands import Operands, product_of, random_array, random_weight, weight_like
from qjax.bench.programs import Effort
from qjax.errors import QuantizeError
from qjax.explain import explain
from qjax.matmul import matmul
from qjax.qtensor import validate_qtensor
from qjax.quantize import quantize_array
from qjax.schemes import W4A16, parse_scheme

N, K = 192, 256


SCHEMES = (
    "w4a16:symmetric=false",
    "w3a16",
    "w8a16:group_size=tensor",
    "nf4:double_quant=true",
    "nvfp4",
    "mxfp8:format=e5m2",
    "fp8:granularity=block",
    "w8a8_fp8",
    "w8a8_int8:mode=static",
)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_random_weight_is_lawful_and_errors_of_its_product_are_seen(name: str) -> None:
    scheme = parse_scheme(name)
    w = validate_qtensor(random_weight(jax.random.key(0), scheme, N, K))
    assert w.shape == (K, N) and w.scheme == scheme
    values = np.asarray(w.dequantize(jnp.float32))
    assert 0.3 < values.std() * np.sqrt(K) < 3  # and finite
    assert len(np.unique(values)) > 3

    x = random_array(jax.random.key(2), (80, K), jnp.bfloat16)
    y = matmul(x, w)
    right = compare(y, rows_of(x, w), columns_of(w))
    assert right.rel_err < 3e-3 and right.err_ratio < 1.05
    wrong = compare(y.at[-1].multiply(1.5), rows_of(x, w), columns_of(w))  # the last row is among the compared ones
    assert wrong.rel_err > 0.03


@pytest.mark.parametrize("name", ["w4a16:group_size=32", "nf4:double_quant=true", "nvfp4"])
def test_a_random_weight_has_the_arrays_that_quantizing_makes(name: str) -> None:
    made = quantize_array(jax.random.normal(jax.random.key(0), (K, N), jnp.bfloat16), name)
    like = weight_like(parse_scheme(name), N, K)
    assert jax.tree.structure(made) == jax.tree.structure(like)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(made)] == [(a.shape, a.dtype) for a in jax.tree.leaves(like)]


def test_the_problem_is_the_one_that_explain_asks_about() -> None:
    for name in ("w4a16:symmetric=false", "w8a8_int8:mode=static", "nvfp4"):
        w = random_weight(jax.random.key(0), parse_scheme(name), N, K)
        problem = product_of(parse_scheme(name), 3, N, K, jnp.bfloat16)
        assert explain(w, 3, x_dtype=jnp.bfloat16).rows[0].shape == problem.shape
        assert problem.out_dtype == jnp.bfloat16
        assert ("zero_point" in problem.features) == ("symmetric=false" in name)


def test_groups_that_do_not_divide_name_the_shape() -> None:
    with pytest.raises(QuantizeError, match="64x200: group_size=128 does not divide K=200"):
        weight_like(W4A16(), 64, 200)


def test_operands_are_made_once_and_differ_from_each_other() -> None:
    operands = Operands(64, 128, Effort(weights=2))
    ws = operands.weights(W4A16())
    assert operands.weights(W4A16()) is ws and len(ws) >= 2
    assert not jnp.array_equal(ws[0].packed, ws[1].packed)
    first, second = operands.rows(3, 2)
    assert first.shape == (3, 128) and not jnp.array_equal(first, second)
    assert operands.rows(3, 1)[0] is first
    assert [w.shape for w in operands.dense((128, 64))] == [(128, 64)] * len(operands.dense((128, 64)))
