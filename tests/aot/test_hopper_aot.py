"""Configurations of Hopper kernels that they do not pick by themselves compile: clusters, shares of K, registers handed
over. A warpgroup that asks for more registers than were given back waits forever, so their sum is compared too."""

import dataclasses
from collections.abc import Iterator

import pytest
from aot.compiler import Compiler, missing
from products import Product

from pallas_kernels.mosaic import folded_plan, w4a8_plan, w8a8_plan, walk
from pallas_kernels.mosaic.tiles import Tile

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.slow

# rows of x, the configuration
CONFIGS = [
    (1, Tile(8, 1, 4, 2, 8, 2, 0)),
    (1, Tile(8, 2, 1, 1, 3, 4, 0)),
    (16, Tile(16, 3, 1, 1, 3, 2, 1)),
    (64, Tile(64, 3, 1, 1, 2, 2, 0, 2)),
    (64, Tile(64, 2, 1, 1, 2, 2, 1)),
    (2048, Tile(128, 2, 1, 1, 3, 1, 0, 4)),
]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    one = Compiler()
    yield one
    one.close()


@pytest.mark.parametrize(("m", "tile"), CONFIGS, ids=str)
def test_a_configuration_compiles_with_the_registers_that_it_counts_on(m: int, tile: Tile, compiler: Compiler) -> None:
    product = Product("w4a16", m, 4096, 22016)
    report = compiler("H200", product, "mosaic.matmul_packed", dataclasses.asdict(tile))
    assert not report.error, report.error
    (kernel,) = (k for k in report.kernels if "hopper" in k.name)
    assert (kernel.spills, kernel.stack, kernel.serialized) == (0, 0, False)
    assert kernel.registers <= tile.registers
    producer, consumer = tile.handed_over(columns=1)
    if tile.needs > tile.registers:
        assert producer + tile.consumers * consumer <= (tile.consumers + 1) * kernel.registers


# scheme, rows of x, K, N, the configuration with folded scales, epilogue
OF_FOLDED = [
    ("w4a16", 64, 4096, 22016, folded_plan.Tile(64, 3, 1, 2, 3), {}),
    ("w4a16", 64, 8192, 8192, folded_plan.Tile(64, 1, 4, 1, 8), {}),
    ("w4a16", 128, 4096, 22016, folded_plan.Tile(128, 3, 1, 1, 4, 2), {}),
    ("w4a16", 2048, 4096, 22016, folded_plan.Tile(256, 2, 1, 1, 3, 2), {}),
    ("w4a16:symmetric=false", 2048, 4096, 22016, folded_plan.Tile(256, 2, 1, 1, 3, 2), {}),
    ("w4a16", 65, 392, 130, folded_plan.Tile(128, 1, 2, 1, 4), {"stack": 2}),
    ("w4a16:group_size=32", 257, 1001, 77, folded_plan.Tile(192, 2, 1, 1, 3), {"x_dtype": "float16"}),
    ("nvfp4", 257, 4304, 328, folded_plan.Tile(192, 2, 1, 1, 3), {"epilogue": True}),
    ("nf4", 257, 7392, 520, folded_plan.Tile(128, 3, 1, 1, 3), {}),
    ("w8a16", 2048, 4096, 22016, folded_plan.Tile(128, 3, 1, 1, 3), {}),
    ("w8a16", 2048, 8192, 8192, folded_plan.Tile(192, 2, 1, 1, 3), {}),
    ("fp8", 64, 4096, 22016, folded_plan.Tile(64, 3, 1, 1, 5), {}),
    ("w8a16:group_size=64", 128, 4096, 4096, folded_plan.Tile(64, 2, 2, 1, 4), {"x_dtype": "float16"}),
]


@pytest.mark.parametrize(("scheme", "m", "k", "n", "tile", "variant"), OF_FOLDED, ids=str)
def test_a_configuration_with_folded_scales_compiles_with_the_registers_that_it_counts_on(
    scheme: str, m: int, k: int, n: int, tile: folded_plan.Tile, variant: dict, compiler: Compiler
) -> None:
    product = Product(scheme, m, k, n, **variant)
    report = compiler("H200", product, "mosaic.matmul_folded", dataclasses.asdict(tile))
    assert not report.error, report.error
    (kernel,) = (k for k in report.kernels if "hopper_folded" in k.name)
    assert (kernel.spills, kernel.stack, kernel.serialized) == (0, 0, False)
    producer, consumer = tile.registers
    assert producer + tile.consumers * consumer <= (tile.consumers + 1) * kernel.registers


# rows of x, K, N, the configuration of 8 by 8 bits
OF_BYTES = [
    ("w8a8_int8", 2048, 4096, 22016, w8a8_plan.Tile(256, 4, 2)),
    ("w8a8_int8", 257, 4304, 333, w8a8_plan.Tile(256, 4, 1)),
    ("w8a8_int8", 100, 4096, 4096, w8a8_plan.Tile(64, 8, 1)),
    ("w8a8_fp8", 2048, 4096, 22016, w8a8_plan.Tile(192, 4, 2)),
    ("w8a8_fp8", 2048, 4096, 4096, w8a8_plan.Tile(128, 5, 1)),
]


@pytest.mark.parametrize(("scheme", "m", "k", "n", "tile"), OF_BYTES, ids=str)
def test_a_configuration_of_8_by_8_bits_compiles_with_the_registers_that_it_counts_on(
    scheme: str, m: int, k: int, n: int, tile: w8a8_plan.Tile, compiler: Compiler
) -> None:
    report = compiler("H200", Product(scheme, m, k, n), "mosaic.matmul_w8a8", dataclasses.asdict(tile))
    assert not report.error, report.error
    (kernel,) = (k for k in report.kernels if "hopper" in k.name)
    assert (kernel.spills, kernel.stack, kernel.serialized) == (0, 0, False)
    producer, consumer = walk.REGISTERS
    assert producer + walk.CONSUMERS * consumer <= (walk.CONSUMERS + 1) * kernel.registers


# rows of x, K, N, the configuration of 4 by 8 bits
OF_NIBBLES = [
    ("w4a8_int8", 2048, 4096, 22016, w4a8_plan.Tile(160, 6, 2, 64)),
    ("w4a8_int8", 257, 4304, 333, w4a8_plan.Tile(192, 5, 1)),
    ("w4a8_int8:group_size=256", 100, 11008, 4096, w4a8_plan.Tile(64, 8, 2)),
    ("w4a8_int8", 65, 100, 40, w4a8_plan.Tile(96, 8, 2)),
]


@pytest.mark.parametrize("epilogue", [False, True])
@pytest.mark.parametrize(("scheme", "m", "k", "n", "tile"), OF_NIBBLES, ids=str)
def test_a_configuration_of_4_by_8_bits_compiles_with_the_registers_that_it_counts_on(
    scheme: str, m: int, k: int, n: int, tile: w4a8_plan.Tile, epilogue: bool, compiler: Compiler
) -> None:
    product = Product(scheme, m, k, n, epilogue=epilogue)
    report = compiler("H200", product, "mosaic.matmul_w4a8", dataclasses.asdict(tile))
    assert not report.error, report.error
    (kernel,) = (k for k in report.kernels if "hopper" in k.name)
    assert (kernel.spills, kernel.stack, kernel.serialized) == (0, 0, False)
    producer, consumer = walk.REGISTERS
    assert producer + walk.CONSUMERS * consumer <= (walk.CONSUMERS + 1) * kernel.registers
