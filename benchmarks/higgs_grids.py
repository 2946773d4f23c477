"""Grids of HIGGS: n points in p dimensions that err least on a normal distribution.

The error of a grid G is `E min_g |x - g|^2 / p`. For p = 1 Lloyd's iteration with exact means of intervals; for p = 2
the error and its gradient `2 (g P(g) - E[x; x nearest g])` as sums over a lattice, from several starts, by L-BFGS.

    python -m benchmarks.higgs_grids --starts 24 --output qjax/higgs_grids.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.spatial import KDTree
from scipy.stats import norm

REACH = 5.6  # of the lattice, beyond which 1.5e-7 of the distribution lies


def scalars(n: int) -> tuple[float, np.ndarray]:
    """The grid of `n` numbers and its error."""
    grid = norm.ppf((np.arange(n) + 0.5) / n)
    for _ in range(20000):
        edges = np.concatenate([[-np.inf], (grid[1:] + grid[:-1]) / 2, [np.inf]])
        share = np.diff(norm.cdf(edges))
        grid = -np.diff(norm.pdf(edges)) / share
    grid = (grid - grid[::-1]) / 2
    return 1 - float(np.sum(grid**2 * share)), grid[:, None]


def _lattice(step: float) -> tuple[np.ndarray, np.ndarray]:
    along = np.arange(-REACH, REACH + step / 2, step)
    weight = np.multiply.outer(norm.pdf(along), norm.pdf(along)).ravel()
    points = np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)
    inside = (points**2).sum(axis=1) < REACH**2
    return points[inside], weight[inside] / weight[inside].sum()


def _error(grid: np.ndarray, points: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Of a grid: its error, the gradient of that, and the share of each point."""
    distance, nearest = KDTree(grid).query(points)
    share = np.bincount(nearest, weight, minlength=len(grid))
    moment = [np.bincount(nearest, weight * points[:, i], minlength=len(grid)) for i in range(2)]
    return (weight * distance**2).sum() / 2, grid * share[:, None] - np.stack(moment, axis=-1), share


def _descended(grid: np.ndarray, step: float) -> tuple[float, np.ndarray]:
    points, weight = _lattice(step)
    _, _, share = _error(grid, points, weight)
    unit = 1 / np.sqrt(np.maximum(share, 1e-6))[:, None]  # curvatures of all points are then alike

    def of(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        error, gradient, _ = _error(scaled.reshape(grid.shape) * unit, points, weight)
        return error, (gradient * unit).ravel()

    found = minimize(of, (grid / unit).ravel(), jac=True, method="L-BFGS-B", options=dict(maxiter=400, maxfun=500))
    return float(found.fun), found.x.reshape(grid.shape) * unit


def pairs(n: int, starts: int) -> tuple[float, np.ndarray]:
    """The best grid of `n` pairs that was found, and its error."""
    found = []
    for seed in range(starts):
        rng = np.random.default_rng(seed)
        grid = rng.normal(size=(n, 2)) * 1.3
        points, weight = _lattice(0.06)
        for _ in range(60):  # Lloyd's, which brings all points to where the distribution is
            _, gradient, share = _error(grid, points, weight)
            centre = grid - gradient / np.maximum(share, 1e-30)[:, None]
            grid = np.where(share[:, None] > 0, centre, rng.normal(size=(n, 2)))
        for step in (0.06, 0.03, 0.02):
            error, grid = _descended(grid, step)
        print(f"{n} pairs, start {seed}: {error:.6f}", flush=True)
        found.append((error, seed, grid[np.lexsort(grid.T[::-1])]))
    error, _, best = min(found)
    return error, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=24, help="of pairs; the best is taken")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    grids = {}
    for bits in (2, 3, 4):
        for p, (error, grid) in ((1, scalars(2**bits)), (2, pairs(4**bits, arguments.starts))):
            print(f"bits={bits}, p={p}: {error:.6f}", flush=True)
            grids[f"bits={bits},p={p}"] = [round(float(v), 15 if p == 1 else 6) for v in grid.ravel()]
    arguments.output.write_text(json.dumps(grids) + "\n")


if __name__ == "__main__":
    main()
