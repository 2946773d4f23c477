"""`qjax generate DIR --prompt TEXT`: what the model writes, as it writes it."""

import argparse
import sys

from qjax.cli.opening import add_model, add_tokenizer, backend_of, open_model, open_tokenizer
from qjax.models.generate import generate
from qjax.models.kv_cache import CODED
from qjax.models.prefill import CHOICES
from qjax.models.tokenizer import Tokenizer

HELP = "continue a prompt, streaming the text"

UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are no whole character yet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DIR --prompt, and how to sample."""
    add_model(parser)
    add_tokenizer(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-k", type=int, help="draw from the so many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="of those, from the fewest whose probabilities reach this")
    parser.add_argument(
        "--cache", choices=("dense", *CODED), default="dense", help="of past tokens; default: %(default)s"
    )
    parser.add_argument(
        "--prompt-activations", choices=CHOICES, default="scheme",
        help="how x is quantized while the prompt is read; default: as the weights' schemes say",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")


def run(args: argparse.Namespace) -> None:
    """Streams the continuation, without the prompt."""
    tokenizer = open_tokenizer(args.folder, args.tokenizer)
    prompt = tokenizer.encode(args.prompt)
    with backend_of(args):
        model = open_model(args.folder, args.dtype)
        stream = TextStream(tokenizer, prompt, args.stop)
        try:
            generate(
                model,
                [prompt],
                max_new_tokens=args.max_new_tokens,
                cache_dtype=None if args.cache == "dense" else args.cache,
                prompt_activations=args.prompt_activations,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                stop_tokens=model.config.eos_token_ids,
                seed=args.seed,
                callback=lambda row, token: stream.add(token),
            )
            stream.finish()
        except _Stopped:
            pass
    print()


class _Stopped(Exception):
    """A stop text was written: ends the loop that calls back."""


class TextStream:
    """Tokens in, text out: whole characters only, and nothing of a stop text.

    It decodes prompt and continuation together, since decoders treat the beginning of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int], stops: list[str]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(prompt)
        self.stops = [stop for stop in stops if stop]
        self.start = self.written = len(tokenizer.decode(prompt))

    def add(self, token: int) -> None:
        """Writes what is certain by now. Raises `_Stopped` where a stop text is complete."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        ends = [end for stop in self.stops if (end := text.find(stop, self.start)) >= 0]
        if ends:
            self._write(text[: min(ends)])
            raise _Stopped
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        text = text[: len(text) - held] if held else text
        self._write(text.rstrip(UNFINISHED))

    def finish(self) -> None:
        """Writes what was held back."""
        self._write(self.tokenizer.decode(self.ids))

    def _write(self, text: str) -> None:
        sys.stdout.write(text[self.written :])
        sys.stdout.flush()
        self.written = max(self.written, len(text))
