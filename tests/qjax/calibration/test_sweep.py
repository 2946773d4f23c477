"""Rounding by columns against float64 loops written from the papers; the error may only fall."""

import numpy as np
import pytest

from qjax.calibration.grid import Grid
from qjax.calibration.layer import damped_factor
from qjax.calibration.sweep import descend, factor, gptq

N, K, WIDTH = 6, 24, 8
INT4 = Grid(4, symmetric=False, dtype=np.dtype("float32"))


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(K, K))
    x = (rng.normal(size=(200, K)) @ mix).astype(np.float32)
    return rng.normal(size=(N, K)).astype(np.float32), x.T @ x / 200 + 0.1 * np.eye(K, dtype=np.float32)


def loss(w, values, hessian):
    left = np.float64(w) - np.float64(values)
    return np.einsum("nk,kj,nj->n", left, np.float64(hessian), left)


def test_the_factor_is_that_of_the_inverse(problem):
    _, hessian = problem
    upper = np.asarray(factor(hessian), np.float64)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ hessian, np.eye(K), atol=1e-3)


def paper(w, hessian, scale, zero, top):
    """GPTQ column by column: after each, the inverse of the Hessian of those that are left."""
    w, hessian, codes = np.float64(w), np.float64(hessian), np.zeros(w.shape)
    for j in range(K):
        codes[:, j] = np.clip(np.round(w[:, j] / scale[:, j]) + zero[:, j], 0, top)
        inverse = np.linalg.inv(hessian[j:, j:])
        error = w[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
        w[:, j:] -= np.outer(error, inverse[0] / inverse[0, 0])
    return codes


def test_blocked_updates_are_those_of_the_paper(problem):
    w, hessian = problem
    scale, zero = INT4.fit(w.reshape(N, -1, WIDTH), 1.0)
    scale, zero = (np.repeat(np.asarray(a[..., 0]), WIDTH, axis=1) for a in (scale, zero))
    codes, *_ = gptq(w, factor(hessian), scale, zero, grid=INT4, width=WIDTH, own=False)
    want = paper(w, hessian, scale, zero, 15)
    # A value half way between two codes may go either way in float32, and moves those after it in its row.
    assert np.mean(np.asarray(codes) == want) > 0.98
    values, wanted = ((c - zero) * scale for c in (np.asarray(codes), want))
    np.testing.assert_allclose(loss(w, values, hessian).sum(), loss(w, wanted, hessian).sum(), rtol=0.02)


def test_a_group_gets_its_scale_from_weights_that_made_up_for_earlier_errors(problem):
    w, hessian = problem
    codes, scale, zero = (np.asarray(a) for a in gptq(w, factor(hessian), w, w, grid=INT4, width=WIDTH, own=True))
    first = INT4.fit(w[:, :WIDTH], 1.0)
    np.testing.assert_array_equal(scale[:, :1], first[0])
    assert (scale.reshape(N, -1, WIDTH) == scale.reshape(N, -1, WIDTH)[..., :1]).all()
    nearest = INT4.value(INT4.nearest(w, scale, zero), scale, zero)
    assert loss(w, (codes - zero) * scale, hessian).sum() < 0.8 * loss(w, nearest, hessian).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_pass_of_descent_makes_no_row_worse(problem, symmetric):
    w, hessian = problem
    grid = Grid(3, symmetric, np.dtype("float16"))
    scale, zero = (np.asarray(a[..., 0]) for a in grid.fit(w.reshape(N, -1, WIDTH), 1.0))
    wide = [np.repeat(a, WIDTH, axis=1) for a in (scale, zero)]
    codes = np.asarray(grid.nearest(w, *wide))
    errors = [loss(w, (codes - wide[1]) * wide[0], hessian)]
    for _ in range(3):
        codes, scale, zero = (
            np.asarray(a) for a in descend(w, codes, scale, zero, hessian, grid=grid, width=WIDTH, passes=1)
        )
        np.testing.assert_array_equal(scale, scale.astype(np.float16))
        assert 0 <= codes.min() and codes.max() <= 7 and (zero == np.round(zero)).all()
        errors.append(loss(w, (codes - np.repeat(zero, WIDTH, 1)) * np.repeat(scale, WIDTH, 1), hessian))
    assert all((after <= before * (1 + 1e-4)).all() for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1].sum() < 0.7 * errors[0].sum()


def test_a_singular_hessian_is_damped_until_it_can_be_factored_and_the_layer_is_named(problem, caplog):
    w, _ = problem
    hessian = np.outer(w[0], w[0])  # one token
    damped, upper = damped_factor(hessian, np.arange(K), 0.0, 0, "layers/3/up")
    assert np.isfinite(upper).all()
    np.testing.assert_allclose(np.asarray(upper).T @ upper @ damped, np.eye(K), atol=0.05)
    assert "layers/3/up" in caplog.text and "damping raised from 0 to" in caplog.text


def test_inputs_that_are_all_zero_leave_a_hessian_that_can_be_factored():
    damped, upper = damped_factor(np.zeros((K, K), np.float32), np.arange(K), 0.01, 8, "up")
    assert np.isfinite(upper).all() and damped.shape == (K + 8, K + 8)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clip_search_finds_the_best_of_the_shares_it_tries(symmetric):
    rng = np.random.default_rng(1)
    w, weight = rng.standard_t(3, size=(5, 32)).astype(np.float32), rng.uniform(0.1, 1, 32).astype(np.float32)

    def error(grid):
        scale, zero = grid.fit(w, weight)
        return np.sum(weight * (np.asarray(grid.value(grid.nearest(w, scale, zero), scale, zero)) - w) ** 2, axis=1)

    found = error(Grid(3, symmetric, np.dtype("float32"), shrinks=6))
    shares = np.linspace(1, 0.4, 7)
    each = []
    for share in shares:
        cut = np.clip(w, share * w.min(1, keepdims=True), share * w.max(1, keepdims=True))
        if symmetric:
            cut = np.clip(w, -share * np.abs(w).max(1, keepdims=True), share * np.abs(w).max(1, keepdims=True))
        scale, zero = Grid(3, symmetric, np.dtype("float32")).fit(cut, 1.0)
        grid = Grid(3, symmetric, np.dtype("float32"))
        each.append(np.sum(weight * (np.asarray(grid.value(grid.nearest(w, scale, zero), scale, zero)) - w) ** 2, 1))
    np.testing.assert_allclose(found, np.min(each, axis=0), rtol=1e-4)
