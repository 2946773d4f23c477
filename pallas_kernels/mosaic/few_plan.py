"""Static facts of a product of few rows of x on Hopper (`matmul_few`): its configuration, and what follows from it."""

import dataclasses
import math

import jax.numpy as jnp

BLOCK_BYTES = 64  # of a row's codes
BYTES = ("int8", "e4m3")  # formats whose codes are bytes
STRIP = 16  # rows of the weight: those of `mma`
MOST_ROWS = 16  # of x
_REGISTERS = 80  # of a thread, for x and its sums


@dataclasses.dataclass(frozen=True)
class Few:
    """A configuration.

    Attributes:
      warps: that share K, a power of two.
      side_by_side: such groups of warps, each with its own strips; `warps * side_by_side` is a multiple of 4.
      strips: of 16 rows, of a program; a multiple of `side_by_side`.
      blocks: of 128 columns, that a warp has of x in registers and copies at a time.
      ring: strips times `blocks` that are on their way.
    """

    warps: int
    side_by_side: int
    strips: int
    blocks: int
    ring: int

    @property
    def all_warps(self) -> int:
        """Of a program."""
        return self.warps * self.side_by_side

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * self.all_warps


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static facts of one call. Names of dtypes; None for what is not there."""

    m: int
    n: int
    k: int  # of x as it lies: a multiple of 8
    weight: str
    x: str
    scale: str | None  # of groups
    group: int
    groups: int  # columns of scale
    zeros: bool
    row_scale: str | None  # of rows, instead of groups
    global_scale: int | None  # its dimensions
    bias: str | None
    residual: str | None
    out: str
    config: Few
    ends: str = "plain"  # or what `step_program` knows
    norm: str | None = None  # of the next norm's weight: y times it and y's squares are wanted, too
    mean: tuple[int, int, float] | None = None  # x's sums of squares: how many, of so many features; epsilon
    place: str = "alone"  # or "first", "behind" among launches of one call, each of which begins before the last ends

    @property
    def block(self) -> int:
        """Columns of K."""
        return block_of(self.weight)

    @property
    def blocks(self) -> int:
        """Of K."""
        return -(-self.k // self.block)

    @property
    def steps(self) -> int:
        """Products of 16 columns that make a block."""
        return self.block // 16

    @property
    def x_pitch(self) -> int:
        """Bytes between rows of x of a block in shared memory: no bank twice."""
        return 2 * self.block + 16

    @property
    def rows(self) -> int:
        """Of a program."""
        return STRIP * self.config.strips

    @property
    def programs(self) -> int:
        """Of the launch."""
        return -(-self.n // self.rows)

    @property
    def tiles(self) -> int:
        """Of eight rows of x."""
        return -(-self.m // 8)

    @property
    def chunks(self) -> int:
        """How often a warp loads x."""
        return -(-self.blocks // (self.config.warps * self.config.blocks))

    @property
    def share(self) -> int:
        """Blocks of a warp; whole chunks, so that its scales begin where wide copies can."""
        return self.chunks * self.config.blocks

    @property
    def turns(self) -> int:
        """Strips of a warp."""
        return self.config.strips // self.config.side_by_side

    @property
    def pieces(self) -> int:
        """Of a block, with a scale each."""
        return 1 if self.scale is None else max(1, self.block // self.group)

    @property
    def offset_by_sums(self) -> bool:
        """As the function of that name says."""
        return offset_by_sums(self.weight, self.x)

    @property
    def pitch(self) -> int:
        """Floats from one row of x to the next in the sums: stores of a strip meet no bank twice."""
        return self.rows + 4

    @property
    def columns(self) -> dict[str, str]:
        """Arrays `[N, groups]` and their dtypes: of scales, of zero points."""
        there = {"scale": self.scale, "zero": "int8" if self.zeros else None}
        return {name: dtype for name, dtype in there.items() if dtype is not None}

    def column_bytes(self, dtype: str) -> int:
        """Of a row's entries of a chunk."""
        return self.config.blocks * self.pieces * jnp.dtype(dtype).itemsize

    def column_unit(self, dtype: str) -> int:
        """Bytes that a lane copies at a time of a row's entries; 0 where they do not begin at whole words."""
        if self.group > self.block:
            return 0
        unit = math.gcd(self.column_bytes(dtype), self.groups * jnp.dtype(dtype).itemsize, 16)
        return unit if unit >= 4 else 0

    @property
    def copied_columns(self) -> dict[str, tuple[int, int]]:
        """Where in a slot an array's entries are, and in units of how many bytes; of arrays that are copied."""
        found, begin = {}, 0
        for name, dtype in self.columns.items():
            if unit := self.column_unit(dtype):
                found[name] = begin, unit
                begin += 2 * 32 * self.column_bytes(dtype)
        return found

    @property
    def slot_of_columns(self) -> int:
        """Bytes of a warp's and strip's entries."""
        return sum(2 * 32 * self.column_bytes(self.columns[name]) for name in self.copied_columns)

    @property
    def slot_of_codes(self) -> int:
        """Bytes of a warp's and strip's codes."""
        return self.config.blocks * STRIP * BLOCK_BYTES

    @property
    def x_bytes(self) -> int:
        """Of a warp: x of a chunk, and 16 bytes of zeros."""
        return self.config.blocks * self.m * self.x_pitch + 16

    @property
    def operands(self) -> list[str]:
        """Names of the arrays in device memory that are read, in order."""
        there = dict(
            x=True, packed=True, scale=self.scale or self.row_scale, zero=self.zeros,
            global_scale=self.global_scale is not None, bias=self.bias, residual=self.residual, norm=self.norm,
            squares_of_x=self.mean is not None,
        )  # fmt: skip
        return [name for name, given in there.items() if given]

    @property
    def results(self) -> dict[str, tuple[tuple[int, int], str]]:
        """Shapes and dtypes of the arrays that are written, by name."""
        shape = self.m, self.n // 2 if self.ends == "gate" else self.n
        found = {"out": (shape, self.out)}
        if self.norm:
            found |= {"weighted": (shape, self.out), "squares": ((self.m, self.programs), "float32")}
        return found

    @property
    def shared(self) -> dict[str, int]:
        """Bytes of shared memory by name, multiples of 16."""
        c = self.config
        found = dict(
            codes=c.all_warps * c.ring * self.slot_of_codes,
            columns=c.all_warps * c.ring * self.slot_of_columns,
            x=c.all_warps * self.x_bytes,
            sums=c.warps * self.m * self.pitch * 4,
            inverse=4 * MOST_ROWS if self.mean else 0,
        )
        return {name: -(-size // 16) * 16 for name, size in found.items() if size}


def block_of(weight: str) -> int:
    """Columns of K whose codes are `BLOCK_BYTES` of a row."""
    return BLOCK_BYTES if weight in BYTES else 2 * BLOCK_BYTES


def offset_by_sums(weight: str, x: str) -> bool:
    """Whether what codes are off by is taken from the sums, times the sum of x, and not from the values. Sums of
    float16's `1024 + code` would lose three bits more."""
    return weight == "int4" and x == "bfloat16"


def first_choice(m: int, n: int, k: int, group: int, sums: bool, sms: int, block: int, all_warps: int = 4) -> Few:
    """A configuration from the shape and the chip: one wave of programs, or as few as make do.

    A warp has four or eight blocks on the way: more take longer to ask for than they save.

    Args:
      sums: whether sums of x are kept (`Plan.offset_by_sums`).
      block: columns of one (`Plan.block`).
      all_warps: of a program, at least.
    """
    tiles, blocks, strips = -(-m // 8), -(-k // block), -(-n // STRIP)
    of_block = block // 8 * tiles + sums * 2 * tiles * max(1, block // group)  # registers
    warps = 8
    while warps > 1 and warps >= 2 * blocks:
        warps //= 2
    side_by_side = max(1, all_warps // warps)
    most = min(_REGISTERS // of_block, -(-blocks // warps))
    a_warp = 1 << (max(1, most).bit_length() - 1)
    of_program = -(-strips // (-(-strips // (12 * sms)) * sms))
    rounded = -(-of_program // side_by_side) * side_by_side
    chunks = -(-blocks // (warps * a_warp))
    enough = 4 if chunks == 1 or tiles > 1 else 8  # of two tiles x and the sums leave no room for more
    return Few(warps, side_by_side, rounded, a_warp, 1 if a_warp >= enough else 2)


def candidates(m: int, n: int, k: int, group: int, sums: bool, sms: int, block: int) -> list[Few]:
    """Configurations worth measuring, whether or not they fit."""
    own = first_choice(m, n, k, group, sums, sms, block)
    found: list[Few] = []
    for strips in sorted({own.strips, -(-own.strips // 2), own.strips + 1}):
        for warps, side_by_side in ((8, 1), (16, 1), (4, 1), (4, 2)):
            for blocks in sorted({own.blocks, max(1, own.blocks // 2)}):
                rounded = -(-strips // side_by_side) * side_by_side
                found += [Few(warps, side_by_side, rounded, blocks, ring) for ring in (1, 2, 3, 4)]
    return list(dict.fromkeys([own, *found]))
