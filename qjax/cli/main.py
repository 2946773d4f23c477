"""The command `qjax`: a table of subcommands, and errors in one line.

A subcommand is a module with `HELP`, `add_arguments(parser)` and `run(args)`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import qjax
from qjax.cli import bench, compare, convert, devices, explain, generate, perplexity, quantize, roofline, search, tune
from qjax.errors import QJaxError

COMMANDS = {
    "quantize": quantize,
    "search": search,
    "convert": convert,
    "generate": generate,
    "perplexity": perplexity,
    "compare": compare,
    "explain": explain,
    "devices": devices,
    "roofline": roofline,
    "bench": bench,
    "tune": tune,
}

# The user's own: their message says all. Anything else that gets here is named by its class too.
EXPECTED = (QJaxError, NotImplementedError, OSError)


class _Parser(argparse.ArgumentParser):
    """An argument parser that takes --debug and whose errors are one line; so are those of its subcommands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists what is possible)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = _Parser("qjax", description="Quantize models, run them, and see what that costs.")
    top.add_argument("--version", action="version", version=f"qjax {qjax.__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run, prog=sub.prog)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 after an error, 130 where it was interrupted.

    Arguments that are wrong exit with 2, as argparse has it.
    """
    args = parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if getattr(args, "debug", False):
            raise
        sys.stdout.flush()
        print(f"{args.prog}: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines())
    if isinstance(error, EXPECTED):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (--debug shows where)"
