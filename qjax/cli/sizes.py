"""The sizes and schemes that `bench`, `tune` and `roofline` are asked for: the same arguments, read the same way."""

import argparse
from collections.abc import Sequence

from qjax.bench import cases
from qjax.schemes import Scheme


def add_sizes(parser: argparse.ArgumentParser, *, shapes: str, rows: str, schemes: str) -> None:
    """--shapes, --m and --schemes, with their defaults."""
    parser.add_argument("--shapes", metavar="NxK,...", default=shapes, help="of weights; default: %(default)s")
    parser.add_argument("--m", metavar="M,...", default=rows, help="rows of x; default: %(default)s")
    parser.add_argument(
        "--schemes",
        metavar="S,...",
        default=schemes,
        help="as in w4a16:group_size=64,symmetric=false,nf4 (two); default: %(default)s",
    )


def sizes_of(args: argparse.Namespace) -> tuple[Sequence[Scheme], Sequence[int], Sequence[tuple[int, int]]]:
    """Schemes, rows and shapes.

    Raises:
      QJaxError: something that is none of these.
    """
    return cases.parse_schemes(args.schemes), cases.parse_rows(args.m), cases.parse_shapes(args.shapes)
