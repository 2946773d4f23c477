"""The program of `matmul_few`: what one lane does.

Lane `4r + c` of a warp has rows r and r + 8 of a strip. A block of 64 bytes of these are its words `4c .. 4c + 3`,
twice, which it has copied itself. The second operand of `mma` is x, row r of each tile of eight, those columns whose
codes the lane has: of 128 columns of 4 bits in the packed order `8t + 2c`, `8t + 2c + 1` for t = 0 .. 15, of 64
of bytes `16c` to `16c + 15`. Sums are `[rows r, r + 8][columns 2c, 2c + 1 of the tile]`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from pallas_kernels.mosaic.few_plan import BLOCK_BYTES, BYTES, STRIP, Plan
from pallas_kernels.pairs import MAGIC

_MIDDLE = 8.0


class Program:
    """One product, as a program for `o`: `lanes.Lanes`, or `lanes_numpy.NumpyLanes`."""

    def __init__(self, o: Any, plan: Plan, arrays: dict[str, Any]) -> None:
        """arrays: in device memory, by the names of `plan.operands`."""
        self.o, self.plan, c = o, plan, plan.config
        self.at = {name: o.pointer(array) for name, array in arrays.items()}
        self.row, self.quad = o.lane >> 2, o.lane & 3
        self.along_k, self.along_n = o.warp % c.warps, o.warp // c.warps
        self.first_row = o.program * plan.rows
        self.first_block = self.along_k * plan.share
        self.codes = o.warp * (c.ring * plan.slot_of_codes) + o.lane * 16
        self.columns = o.warp * (c.ring * plan.slot_of_columns)
        self.x = o.warp * plan.x_bytes
        self.nothing = o.integer(0)

    def run(self) -> None:
        """All of it. Behind another launch the weight is asked for while that one ends, x when it has."""
        o, plan = self.o, self.plan
        if plan.m % 8:
            o.write_real("x", self._zeros + self.quad * 4, 0, o.real(0.0), self.row < 1)
        if plan.place == "behind":
            following = self.fill()
        if plan.place != "alone":
            o.wait_for_launch_before()
            o.let_next_launch_begin()
        self.ask()
        self.copy_x(self.nothing)
        o.commit()
        if plan.place == "behind":
            o.wait(0)
        else:
            following = self.fill()
        o.repeat(plan.chunks, self.chunk, [self.nothing, *following])
        self.end()

    def ask(self) -> None:
        """Loads whose values are needed at the end."""

    def fill(self) -> tuple[Any, Any]:
        """Asks for the first strips; the strip and chunk behind them."""
        turn, chunk = self.nothing, self.nothing
        for slot in range(self.plan.config.ring):
            for j in range(self.plan.config.blocks):
                self.fetch(self.o.integer(slot), j, self._sources(turn, chunk))
            turn, chunk = self._after(turn, chunk)
        return turn, chunk

    def end(self) -> None:
        """What follows the sums of all warps."""
        self.o.barrier()
        self.o.repeat(-(-self.plan.rows * self.plan.m // self.plan.config.threads), self.element, [])

    # Where things are

    @property
    def _zeros(self) -> Any:
        return self.x + (self.plan.x_bytes - 16)

    def rows(self, turn: Any) -> list[Any]:
        """The lane's two rows of a strip, those beyond the last being the last."""
        c = self.plan.config
        row = self.first_row + (turn * c.side_by_side + self.along_n) * STRIP + self.row
        return [self.o.minimum(row + 8 * half, self.plan.n - 1) for half in (0, 1)]

    def _left(self, chunk: Any) -> Any:
        """Blocks that the warp still has from a chunk on."""
        end = self.o.minimum(self.first_block + self.plan.share, self.plan.blocks)
        return end - self.first_block - chunk * self.plan.config.blocks

    def _after(self, turn: Any, chunk: Any) -> tuple[Any, Any]:
        """The strip and chunk behind these."""
        last = turn > self.plan.turns - 2
        return self.o.choose(last, self.nothing, turn + 1), self.o.choose(last, chunk + 1, chunk)

    def _sources(self, turn: Any, chunk: Any) -> tuple[list[Any], Any, Any, Any]:
        """Of a strip and chunk: where the codes of both rows are, the rows, the first block, the blocks left."""
        rows, block = self.rows(turn), self.first_block + chunk * self.plan.config.blocks
        codes = [
            self.at["packed"] + row * (BLOCK_BYTES * self.plan.blocks) + (block * BLOCK_BYTES + self.quad * 16)
            for row in rows
        ]
        return codes, rows, block, self._left(chunk)

    # Copies, to be awaited in groups: one a block, x and scales with the first block of the strip that is fetched next

    def copy_x(self, chunk: Any) -> None:
        """Of a chunk, `[blocks, M]` rows of a block's columns, 16 bytes a lane."""
        o, plan = self.o, self.plan
        of_block = plan.block // 8
        of_row, begin = of_block * plan.config.blocks, (self.first_block + chunk * plan.config.blocks) * of_block
        end = o.minimum((self.first_block + plan.share) * of_block, plan.k // 8)
        for first in range(0, plan.m * of_row, 32):
            piece = o.lane + first
            row, column = piece // of_row, piece % of_row
            block = column // of_block
            inside = o.choose(row < plan.m, end - begin, self.nothing) > column
            to = self.x + (block * plan.m + row) * plan.x_pitch + column % of_block * 16
            rest = row < plan.m if first + 32 > plan.m * of_row else None
            at = self.at["x"] + o.minimum(row, plan.m - 1) * (2 * plan.k) + (begin + column) * 16
            o.copy("x", to, 0, at, 0, 16, inside, rest)

    def fetch(self, slot: Any, j: int, sources: tuple[list[Any], Any, Any, Any]) -> None:
        """Block j of a chunk of a strip, with the first one all scales and zero points; ends the group."""
        codes, rows, block, left = sources
        for name, (begin, unit) in self.plan.copied_columns.items() if j == 0 else ():
            self._copy_columns(name, begin, unit, slot, rows, block)
        for half in (0, 1):
            to = self.codes + slot * self.plan.slot_of_codes
            self.o.copy("codes", to, (2 * j + half) * 512, codes[half], 64 * j, 16, left > j)
        self.o.commit()

    def _copy_columns(self, name: str, begin: int, unit: int, slot: Any, rows: list[Any], block: Any) -> None:
        plan, dtype = self.plan, self.plan.columns[name]
        size = jnp.dtype(dtype).itemsize
        to = self.columns + slot * plan.slot_of_columns + self.o.lane * unit
        for half in (0, 1):
            at = self.at[name] + rows[half] * (plan.groups * size) + block * (plan.pieces * size)
            for first in range(0, plan.column_bytes(dtype), unit):
                offset = begin + 32 * (half * plan.column_bytes(dtype) + first)
                inside = block * plan.pieces + first // size < plan.groups
                self.o.copy("columns", to, offset, at, first, unit, inside)

    # Registers

    def load_x(self) -> list[list[list[Any]]]:
        """`[block][tile][2 i + half]` of the second operands."""
        plan = self.plan
        found: list[list[list[Any]]] = []
        for j in range(plan.config.blocks):
            found.append([])
            for tile in range(plan.tiles):
                found[-1].append(self._x_of_bytes(j, tile) if plan.weight in BYTES else self._x_of_nibbles(j, tile))
        return found

    def _x_of_nibbles(self, j: int, tile: int) -> list[Any]:
        row, registers = (self.o.lane & 7) + 8 * tile, []
        for t in range(0, 16, 4):
            registers += self.o.read_matrices("x", self._place_of_x(j, tile, row, (self.o.lane >> 3) * 16 + 16 * t))
        return registers

    def _x_of_bytes(self, j: int, tile: int) -> list[Any]:
        row, registers = self.row + 8 * tile, []
        for half in (0, 16):
            registers += self.o.read("x", self._place_of_x(j, tile, row, self.quad * 32 + half), 16)
        return registers

    def _place_of_x(self, j: int, tile: int, row: Any, offset: Any) -> Any:
        """Of 16 bytes of a row in block j, or of zeros where there is no such row."""
        at = self.x + (row + j * self.plan.m) * self.plan.x_pitch + offset
        return at if 8 * tile + 8 <= self.plan.m else self.o.choose(row < self.plan.m, at, self._zeros)

    def entries(self, name: str, slot: Any, rows: list[Any], block: Any) -> Callable[[int, int], Any]:
        """Scales or zero points of a chunk of a strip: of a half and a piece, in float32, made when asked for."""
        o, plan, dtype = self.o, self.plan, self.plan.columns[name]
        size, (begin, unit) = jnp.dtype(dtype).itemsize, plan.copied_columns.get(name, (0, 0))

        # All words at once: the next strip's may come to where they lie.
        at = self.columns + slot * plan.slot_of_columns + o.lane * unit
        words: tuple[list[Any], list[Any]] = [], []
        for half in (0, 1):
            for first in range(0, plan.column_bytes(dtype) if unit else 0, unit or 1):
                words[half].extend(o.read("columns", at, unit, begin + 32 * (half * plan.column_bytes(dtype) + first)))

        @functools.cache
        def reals(half: int, word: int) -> list[Any]:
            return o.as_reals(words[half][word], dtype)

        def of_copy(half: int, i: int) -> Any:
            return reals(half, i * size // 4)[i * size % 4 // size]

        def of_memory(half: int, i: int) -> Any:
            entry = (block + i) // (plan.group // plan.block) if plan.group > plan.block else block * plan.pieces + i
            at = self.at[name] + rows[half] * (plan.groups * size) + o.minimum(entry, plan.groups - 1) * size
            return o.as_reals(o.load(at, size)[0], dtype)[0]

        return of_copy if unit else functools.cache(of_memory)

    def sums_of_x(self, x: list[list[list[Any]]]) -> list[list[list[Any]]]:
        """`[block * pieces][tile]`: sums of x over a piece, of the lane's two columns of a tile."""
        o, plan = self.o, self.plan
        found: list[list[list[Any]]] = []
        ones = [o.both(o.real(1.0), plan.x)] * 4
        for of_block in x:
            for piece in range(plan.pieces):
                found.append([])
                for registers in of_block:
                    total = [o.real(0.0)] * 4
                    for i in self._steps(piece):
                        total = o.mma(ones, registers[2 * i : 2 * i + 2], total, plan.x)
                    found[-1].append(total[:2])
        return found

    # Arithmetic

    def _steps(self, piece: int) -> range:
        """Products of 16 columns that make a piece."""
        steps, pieces = self.plan.steps, self.plan.pieces
        return range(steps * piece // pieces, steps * (piece + 1) // pieces)

    def chunk(self, chunk: Any, slot: Any, to_turn: Any, to_chunk: Any) -> list[Any]:
        """All strips of a chunk of K."""
        o, plan, c = self.o, self.plan, self.plan.config
        # Groups behind that of x: the first strips', in the first chunk; later a chunk's but for the one x came with.
        behind = c.ring * c.blocks
        o.wait(min(behind, plan.turns * c.blocks - 1) if plan.chunks > 1 else behind)
        o.warp_barrier()
        x = self.load_x()
        sums = self.sums_of_x(x) if plan.offset_by_sums else []
        middle = o.real(-MAGIC[plan.x][1] - _MIDDLE)
        starts = [[[o.multiply(middle, v) for v in tile] for tile in piece] for piece in sums]
        if plan.chunks > 1:
            o.warp_barrier()
            self.copy_x(chunk + 1)

        def strip(turn: Any, slot: Any, to_turn: Any, to_chunk: Any) -> list[Any]:
            rows, block = self.rows(turn), self.first_block + chunk * c.blocks
            sources, total = self._sources(to_turn, to_chunk), [[o.real(0.0)] * 4 for _ in range(plan.tiles)]
            columns: dict[str, Callable[[int, int], Any]] = {}
            for j in range(c.blocks):
                o.wait(c.ring * c.blocks - 1)
                at = self.codes + slot * plan.slot_of_codes
                words = [o.read("codes", at, 16, (2 * j + half) * 512) for half in (0, 1)]
                if j == 0:
                    columns = {name: self.entries(name, slot, rows, block) for name in plan.columns}
                total = self.block(j, words, x[j], columns, sums if plan.zeros else starts, total)
                self.fetch(slot, j, sources)
            self.add_up(turn, chunk, total)
            return [o.choose(slot > c.ring - 2, self.nothing, slot + 1), *self._after(to_turn, to_chunk)]

        return o.repeat(plan.turns, strip, [slot, to_turn, to_chunk])

    def block(
        self, j: int, words: list[list[Any]], x: list[list[Any]], columns: dict[str, Any], sums: Any, total: list[Any]
    ) -> list[list[Any]]:
        """`total` and the products of a block.

        sums: where what codes are off by is taken from these, of x, or with the middle code as the only zero point the
        very products.
        """
        o, plan = self.o, self.plan
        for piece in range(plan.pieces):
            entry = j * plan.pieces + piece
            less: list[Any] = [None, None]
            if plan.zeros:
                offset = o.real(-MAGIC[plan.x][1])
                less = [o.fma(columns["zero"](half, entry), o.real(-1.0), offset) for half in (0, 1)]
            # Two sums in turns where one would be waited for.
            chains = 2 if plan.tiles == plan.pieces == 1 else 1
            parts = [[[o.real(0.0)] * 4 for _ in range(plan.tiles)] for _ in range(chains)]
            if plan.offset_by_sums:
                for tile, of_x in enumerate(sums[entry]):
                    parts[0][tile] = [o.multiply(v, s) for v in less for s in of_x] if plan.zeros else [*of_x, *of_x]
            pairs = [o.both(v, plan.x) if v is not None else None for v in less]
            for i in self._steps(piece):
                a = [self._values(words[half], t, pairs[half]) for t in (2 * i, 2 * i + 1) for half in (0, 1)]
                for tile, registers in enumerate(x):
                    part = parts[i % chains][tile]
                    parts[i % chains][tile] = o.mma(a, registers[2 * i : 2 * i + 2], part, plan.x)
            for tile in range(plan.tiles):
                for value in range(4):
                    part = parts[0][tile][value] if chains == 1 else o.add(parts[0][tile][value], parts[1][tile][value])
                    if plan.scale is None:
                        total[tile][value] = o.add(total[tile][value], part)
                    else:
                        total[tile][value] = o.fma(part, columns["scale"](value // 2, entry), total[tile][value])
        return total

    def _values(self, words: list[Any], t: int, less: Any) -> Any:
        """Pair t of a row's block."""
        plan = self.plan
        if plan.weight in BYTES:
            return self.o.byte_pair(words[t // 2], t % 2, plan.weight, plan.x)
        if plan.offset_by_sums:
            return self.o.offset_pair(words[t // 4], t % 4, plan.x)
        return self.o.pair(words[t // 4], t % 4, plan.weight, plan.x, less)

    def add_up(self, turn: Any, chunk: Any, total: list[list[Any]]) -> None:
        """Adds a strip's sums of a chunk to those of the chunks before."""
        o, plan = self.o, self.plan
        row = (turn * plan.config.side_by_side + self.along_n) * STRIP + self.row
        at = (self.along_k * (plan.m * plan.pitch) + row) * 4 + self.quad * (2 * plan.pitch * 4)
        for tile in range(plan.tiles):
            for value in range(4):
                column = 8 * tile + value % 2
                offset = (column * plan.pitch + 8 * (value // 2)) * 4
                there = None if 8 * tile + 8 <= plan.m else self.quad * 2 < plan.m - column
                new = total[tile][value]
                if plan.chunks > 1:
                    old = o.read_real("sums", at, offset, there)
                    new = o.add(new, o.choose(chunk > 0, old, o.real(0.0)))
                o.write_real("sums", at, offset, new, there)

    def element(self, index: Any) -> list[Any]:
        """One element of y: the sums of all warps, the epilogue, the store."""
        o, plan = self.o, self.plan
        e = index * plan.config.threads + o.thread
        row, local = e // plan.rows, e % plan.rows
        n = self.first_row + local
        inside = o.choose(row < plan.m, n, o.integer(plan.n)) < plan.n
        real_row = o.minimum(row, plan.m - 1)
        y = self.scaled(self.sum_of_warps(real_row, local), n, inside, real_row)
        if plan.bias is not None:
            y = o.add(y, self.real("bias", plan.bias, n, inside))
        if plan.residual is not None:
            y = o.add(y, self.real("residual", plan.residual, row * plan.n + n, inside))
        o.store(self.at["out"] + (row * plan.n + n) * jnp.dtype(plan.out).itemsize, y, plan.out, inside)
        return []

    def sum_of_warps(self, row: Any, local: Any) -> Any:
        """Of a row of x and a row of the program's strips."""
        o, plan = self.o, self.plan
        where = (row * plan.pitch + local) * 4
        y = o.read_real("sums", where)
        for warp in range(1, plan.config.warps):
            y = o.add(y, o.read_real("sums", where, warp * plan.m * plan.pitch * 4))
        return y

    def real(self, name: str, dtype: str, index: Any, inside: Any) -> Any:
        """An element of an array in device memory, in float32; 0 where not `inside`."""
        size = jnp.dtype(dtype).itemsize
        return self.o.as_reals(self.o.load(self.at[name] + index * size, size, 0, inside)[0], dtype)[0]

    def scaled(self, y: Any, n: Any, inside: Any, row: Any) -> Any:
        """Times the scales that a whole row of the weight has."""
        del row
        plan = self.plan
        if plan.row_scale is not None:
            y = self.o.multiply(y, self.real("scale", plan.row_scale, n, inside))
        if plan.global_scale is not None:
            at = n if plan.global_scale else self.nothing
            y = self.o.multiply(y, self.real("global_scale", "float32", at, inside))
        return y
