"""Products of `few_program` that end in what a decoder layer does next: nothing is left for a kernel between them.

A norm divides by a number of the whole row, which nobody knows before the row is done. So who writes y writes y times
the norm's weight as well, and its program's sum of squares; who multiplies by that has all programs' sums long before
its own product is done, and scales the result.
"""

import functools
from collections.abc import Iterator
from typing import Any

from pallas_kernels.mosaic.few_plan import Plan
from pallas_kernels.mosaic.few_program import Program

_SIZE = 2  # bytes of a result


class NormalizedProgram(Program):
    """y = (x / root mean square of what x is a weighted copy of) @ w: the square's sums are `squares_of_x`."""

    def ask(self) -> None:
        """The sums, which are added at the end."""
        o, plan = self.o, self.plan
        self.squares = []
        if plan.mean is not None:
            for row in self._rows_of_x():
                lanes, row = [o.lane + first for first in range(0, plan.mean[0], 32)], o.minimum(row, plan.m - 1)
                at = [(row * plan.mean[0] + i, i < plan.mean[0]) for i in lanes]
                self.squares.append([self.real("squares_of_x", "float32", *where) for where in at])

    def _rows_of_x(self) -> list[Any]:
        """A warp's, of all rows of x shared among the warps; some may be beyond the last."""
        plan = self.plan
        return [self.o.warp + first for first in range(0, plan.m, plan.config.all_warps)]

    def end(self) -> None:
        """1 / root mean square of each row of x."""
        o, plan = self.o, self.plan
        if plan.mean is not None:
            _, features, epsilon = plan.mean
            for row, squares in zip(self._rows_of_x(), self.squares, strict=True):
                mean = o.fma(o.sum_of_lanes(functools.reduce(o.add, squares)), o.real(1 / features), o.real(epsilon))
                o.write_real("inverse", o.minimum(row, 15) * 4, 0, o.inverse_root(mean), (row < plan.m) & (o.lane < 1))
        super().end()

    def scaled(self, y: Any, n: Any, inside: Any, row: Any) -> Any:
        """Times scales of rows, and of x."""
        y = super().scaled(y, n, inside, row)
        return y if self.plan.mean is None else self.o.multiply(y, self.o.read_real("inverse", row * 4))


class GateProgram(NormalizedProgram):
    """silu(first half of y) * second half. A strip is eight rows of the first and the same eight of the second."""

    def rows(self, turn: Any) -> list[Any]:
        """The lane's two rows of a strip, those beyond the last being the last."""
        half, c = self.plan.n // 2, self.plan.config
        row = self.first_row // 2 + (turn * c.side_by_side + self.along_n) * 8 + self.row
        return [self.o.minimum(row, half - 1) + half * which for which in (0, 1)]

    def element(self, index: Any) -> list[Any]:
        """One element."""
        o, plan = self.o, self.plan
        of_program, half = plan.rows // 2, plan.n // 2
        e = index * plan.config.threads + o.thread
        row, local = e // of_program, e % of_program
        n, real_row, at = self.first_row // 2 + local, o.minimum(row, plan.m - 1), local // 8 * 16 + local % 8
        inside = (row < plan.m) & (n < half)
        gate, up = (
            self.scaled(self.sum_of_warps(real_row, at + 8 * which), n + half * which, inside, real_row)
            for which in (0, 1)
        )
        o.store(self.at["out"] + (row * half + n) * _SIZE, o.multiply(o.silu(gate), up), plan.out, inside)
        return []


class ResidualProgram(Program):
    """residual + y; with a norm that times its weight as well, and for each row of x the program's sum of squares."""

    def ask(self) -> None:
        """The residual and the norm's weight: at the end all would wait for them."""
        plan, self.given = self.plan, []
        for first in self._firsts():
            for _, n, at, inside in self._elements(first):
                residual = self.real("residual", plan.out, at, inside)
                self.given.append((residual, plan.norm and self.real("norm", plan.norm, n, inside)))

    def _firsts(self) -> range:
        """Rows of x from each of which on every warp has one, so that its lanes can add squares up."""
        return range(0, self.plan.m, self.plan.config.all_warps)

    def _elements(self, first: int) -> Iterator[tuple[Any, Any, Any, Any]]:
        """A lane's: row of the weight in the program and in all, place in y, whether there is such a one."""
        o, plan = self.o, self.plan
        row, there = o.minimum(o.warp + first, plan.m - 1), o.warp + first < plan.m
        for local in (o.lane + some for some in range(0, plan.rows, 32)):
            n = self.first_row + local
            yield local, n, row * plan.n + n, there & (local < plan.rows) & (n < plan.n)

    def end(self) -> None:
        """Sums of all warps, the residual; squares."""
        o, plan, given = self.o, self.plan, iter(self.given)
        o.barrier()
        for first in self._firsts():
            row, there, squares = o.minimum(o.warp + first, plan.m - 1), o.warp + first < plan.m, o.real(0.0)
            for (local, n, at, inside), (residual, norm) in zip(self._elements(first), given, strict=False):
                y = self.scaled(self.sum_of_warps(row, o.minimum(local, plan.rows - 1)), n, inside, row)
                y = o.add(y, residual)
                y = o.as_reals(o.both(y, plan.out), plan.out)[0]
                o.store(self.at["out"] + at * _SIZE, y, plan.out, inside)
                if plan.norm is not None:
                    weighted = o.multiply(y, norm)
                    o.store(self.at["weighted"] + at * _SIZE, weighted, plan.out, inside)
                    y = o.choose(inside, y, o.real(0.0))
                    squares = o.fma(y, y, squares)
            if plan.norm is not None:
                place = self.at["squares"] + (row * plan.programs + o.program) * 4
                o.store(place, o.sum_of_lanes(squares), "float32", there & (o.lane < 1))


def program_of(plan: Plan) -> type[Program]:
    """Of a plan."""
    if plan.ends == "plain":
        return Program if plan.mean is None else NormalizedProgram
    return {"gate": GateProgram, "residual": ResidualProgram}[plan.ends]
