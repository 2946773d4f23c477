"""The timed loop: it computes what it says, as often as it says, and XLA cannot make it less."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from qjax import devices
from qjax.bench.programs import FULL, Effort, build, build_all, loop_of, one_line, rotation
from qjax.errors import QTensorError


def operands(count: int) -> tuple[list[jax.Array], list[jax.Array]]:
    xs = [jax.random.normal(jax.random.key(i), (2, 8)) for i in range(count)]
    return xs, [jax.random.normal(jax.random.key(100 + i), (8, 4)) for i in range(count)]


def test_the_total_is_of_every_product_in_every_round() -> None:
    xs, ws = operands(3)
    total, y = loop_of(jnp.dot, 5)(xs, ws)
    each = sum(float((x @ w)[0, 0]) for x, w in zip(xs, ws, strict=True))
    assert float(total) == pytest.approx(5 * each, rel=1e-5)
    assert jnp.allclose(y, xs[0] @ ws[0])


def test_no_product_is_merged_dropped_or_lifted_out_of_the_loop() -> None:
    xs, ws = operands(4)
    same = [xs[0]] * 4  # even where they share an operand
    compiled = jax.jit(loop_of(jnp.dot, 5)).lower(same, ws).compile().as_text()
    whole = re.findall(r"f32\[2,4\]\S* dot\(.*/while/body/", compiled)
    assert len(whole) == 4, compiled


def test_a_program_makes_as_many_calls_as_fit_in_its_time() -> None:
    xs, ws = operands(4)
    effort = Effort(seconds=0.01, most_calls=500)
    assert build("dot", jnp.dot, xs, ws, 1e-4, effort).calls == 100 + 1
    assert build("dot", jnp.dot, xs, ws, 1e-9, effort).calls == 500 + 1
    assert build("dot", jnp.dot, xs, ws, 10.0, effort).calls == 4 + 1


def test_what_does_not_compile_is_an_exception_in_its_place() -> None:
    xs, ws = operands(2)

    def refuse(x: jax.Array, w: jax.Array) -> jax.Array:
        raise NotImplementedError("no such tile")

    fine, broken = build_all([lambda f=f: build("p", f, xs, ws, 1.0, Effort()) for f in (jnp.dot, refuse)])
    assert not isinstance(fine, Exception) and fine.run()[1].shape == (2, 4)
    assert isinstance(broken, NotImplementedError)
    assert one_line(broken) == "NotImplementedError: no such tile"
    assert one_line(QTensorError("two\n  lines")) == "two lines"


def test_weights_exceed_twice_the_cache_and_stay_within_memory() -> None:
    h200 = devices.find_device("H200")
    for size in (2**20, 9 * 2**20, 90 * 2**20, 360 * 2**20):
        count = rotation(size, h200)
        assert 2 <= count <= 2 * FULL.weights
        assert count * size > 2 * h200.l2 or count == 2 * FULL.weights
        assert count * size <= max(h200.memory / 32, 3 * h200.l2)
    small = dataclasses.replace(h200, memory=2**30)
    assert rotation(360 * 2**20, small) == 2
