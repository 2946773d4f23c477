"""The multiple-choice knapsack: an option for each layer, within a budget, at least cost.

`choose` has SciPy's HiGHS solve it for one budget. `frontier` has those budgets for which it is easy: where options are
taken up in the order of what they gain for a byte, every sum on the way is the best of its size.
"""

import itertools
from collections.abc import Sequence

import numpy as np

GAP = 1e-4  # how far from the best, relatively, a solution may be
PATIENCE = 30.0  # seconds


def choose(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The option of each layer: costs add up to the least, within `GAP`, of all choices whose sizes stay in a budget.

    `min sum_lc x_lc cost_lc` over x in {0, 1} with `sum_c x_lc = 1` and `sum_lc x_lc size_lc <= budget`.

    Args:
      costs: of each option of each layer; layers may have different numbers of them.
      sizes: of the same options.
      budget: at least the sum of the smallest.
    """
    spare = budget - sum(map(min, sizes))
    assert spare >= 0, (budget, spare)
    while True:
        chosen = _solve(costs, sizes, spare)
        excess = sum(layer[i] for layer, i in zip(sizes, chosen, strict=True)) - budget
        if excess <= 0:
            return chosen
        spare -= excess  # the solver keeps to a budget up to a tolerance


def frontier(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Sizes and costs of best choices, from the smallest one to that of least cost.

    They are the corners of the convex hull of all choices; between two of them `choose` may find others.

    Args:
      costs, sizes: as of `choose`.
    """
    hulls = [_hull(sorted(zip(*layer, strict=True))) for layer in zip(sizes, costs, strict=True)]
    steps = [(b[0] - a[0], b[1] - a[1]) for hull in hulls for a, b in itertools.pairwise(hull)]
    steps.sort(key=lambda step: step[1] / step[0])
    first = (sum(hull[0][0] for hull in hulls), sum(hull[0][1] for hull in hulls))
    return list(itertools.accumulate(steps, lambda at, step: (at[0] + step[0], at[1] + step[1]), initial=first))


def _hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of a layer's options by size: those from which each further byte gains less than the byte before."""
    found: list[tuple[int, float]] = []
    for size, cost in points:
        if found and (cost >= found[-1][1] or size == found[-1][0]):
            continue
        while len(found) > 1:
            (a, before), (b, at) = found[-2:]
            if (at - before) * (size - b) < (cost - at) * (b - a):
                break
            found.pop()
        found.append((size, cost))
    return found


def _solve(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], spare: int) -> list[int]:
    """The same, with `spare` more than the smallest options take; it may be exceeded by a millionth."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    counts = [len(layer) for layer in costs]
    cost = np.array(list(itertools.chain(*costs)))
    extra = np.array([size - min(layer) for layer in sizes for size in layer])
    layer = np.repeat(np.arange(len(counts)), counts)
    once = csr_array((np.ones(len(cost)), (layer, np.arange(len(cost)))))
    room = LinearConstraint(csr_array(extra[None] / max(spare, 1)), -np.inf, 1)
    found = milp(
        cost / (cost.max() or 1.0),
        constraints=[LinearConstraint(once, 1, 1), room],
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, np.where(extra <= spare, 1, 0)),
        options={"mip_rel_gap": GAP, "time_limit": PATIENCE},
    )
    assert found.x is not None, f"the smallest options fit: {found.message}"
    ends = np.cumsum(counts)
    return [int(np.argmax(x)) for x in np.split(found.x, ends[:-1])]
