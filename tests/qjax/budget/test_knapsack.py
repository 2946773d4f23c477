"""`choose` and `frontier` against every choice there is."""

import itertools

import numpy as np
import pytest

from qjax.budget.knapsack import GAP, choose, frontier


def instance(seed, layers=5, options=4):
    """Sizes and costs with ties, options that are never worth it, and layers of different length."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, options + 1, layers)
    sizes = [rng.integers(1, 9, n).tolist() for n in counts]
    costs = [(rng.lognormal(size=n) / np.array(size)).round(2).tolist() for n, size in zip(counts, sizes, strict=True)]
    return costs, sizes


def every_choice(costs, sizes):
    ways = list(itertools.product(*(range(len(layer)) for layer in costs)))
    return [tuple(sum(layer[i] for layer, i in zip(t, way, strict=True)) for t in (sizes, costs)) for way in ways]


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_cheapest_of_all_within_the_budget(seed):
    costs, sizes = instance(seed)
    ways = every_choice(costs, sizes)
    least, most = min(ways)[0], max(ways)[0]
    for budget in sorted({least, (2 * least + most) // 3, (least + most) // 2, most, most + 7}):
        chosen = choose(costs, sizes, budget)
        size, cost = (sum(layer[i] for layer, i in zip(t, chosen, strict=True)) for t in (sizes, costs))
        assert size <= budget
        assert cost <= min(cost for size, cost in ways if size <= budget) * (1 + GAP) + 1e-9


@pytest.mark.parametrize("seed", range(12))
def test_each_point_of_the_frontier_is_the_cheapest_of_its_size(seed):
    costs, sizes = instance(seed)
    ways = every_choice(costs, sizes)
    points = frontier(costs, sizes)
    for size, cost in points:
        assert cost == pytest.approx(min(cost for other, cost in ways if other <= size))
    assert points[0][0] == min(ways)[0]
    assert points[-1][1] == pytest.approx(min(cost for _, cost in ways))
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(points)]
    assert all(one < 0 for one in slopes) and slopes == sorted(slopes)


def test_options_that_cost_nothing_are_no_trouble():
    assert choose([[0.0], [0.0, 0.0]], [[5], [9, 4]], 9) == [0, 1]
    assert frontier([[0.0], [0.0, 0.0]], [[5], [9, 4]]) == [(9, 0.0)]


def test_bytes_of_a_large_model_are_kept_to_the_byte():
    rng = np.random.default_rng(0)
    sizes = [(10**8 * np.arange(2, 9) + rng.integers(0, 9, 7)).tolist() for _ in range(40)]
    costs = [(rng.lognormal() * 4.0 ** -np.arange(7)).tolist() for _ in range(40)]
    budget = sum(layer[2] for layer in sizes)
    assert sum(layer[i] for layer, i in zip(sizes, choose(costs, sizes, budget), strict=True)) <= budget
