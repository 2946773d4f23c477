"""Rules: which layer gets which scheme, by a regex over its path. Knows names only: no arrays, no modules.

A path is a module's, its parts joined by '/': `layers/0/self_attn/q_proj`. A pattern has to match all of it
(`re.fullmatch`) and the first rule that does wins; written with dots it matches too, since '.' is any character. The
pattern `.*` speaks of ordinary layers only: heads and embeddings keep their precision unless a rule names them.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qjax.errors import RuleError, SchemeError
from qjax.schemes import Scheme, as_scheme

Kind = Literal["dense", "embedding"]

# What a param is, by its name.
KINDS: dict[str, Kind] = {"kernel": "dense", "embedding": "embedding"}

EVERYTHING = ".*"

# Names of modules (the last part of a path) that make logits: too few weights to save much by, and the most sensitive.
HEADS = (
    "lm_head",
    "head",
    "heads",
    "logits",
    "logits_dense",
    "classifier",
    "classification_head",
    "score",
    "unembed",
    "output_projection",
    "embed_out",
)

# Flax's own names for convolutions (`Conv_0`, `ConvTranspose_0`) and what users call theirs (`conv1`, `stem_conv`).
_CONVOLUTION = re.compile(r"(.*_)?conv(transpose|local)?([^a-z].*)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers whose path a pattern matches.

    Attributes:
      pattern: a regular expression for the whole path.
      scheme: how to quantize them; None leaves them alone.
      axis: contracted axes of the kernel, where its rank is not 2 and no model tells; negative ones count from its end.
      stacked: axes of the kernel over which layers are stacked (`nn.scan`, `nn.vmap`, experts).
      partial_groups: allow a short last group where the group size does not divide K.
      k_pieces: pieces of K that are padded on their own, for as many shards.
    """

    pattern: str
    scheme: Scheme | None
    axis: tuple[int, ...] | None = None
    stacked: tuple[int, ...] | None = None
    partial_groups: bool = False
    k_pieces: int = 1

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise RuleError(f"rule {self.pattern!r} is no regular expression: {error}") from error

    def matches(self, path: str, kind: Kind = "dense") -> bool:
        """Whether this rule speaks of the layer at `path`."""
        if self.pattern == EVERYTHING:
            return kind == "dense" and not is_head(path)
        return re.fullmatch(self.pattern, path) is not None


def is_head(path: str) -> bool:
    """Whether the module at `path` has the name of an output head."""
    return path.rpartition("/")[2].lower() in HEADS


def is_convolution(path: str) -> bool:
    """Whether the module at `path` has the name of a convolution."""
    return _CONVOLUTION.fullmatch(path.rpartition("/")[2]) is not None


def _as_rule(item: Any) -> Rule:
    rule = Rule(*item) if isinstance(item, tuple) and len(item) == 2 else item
    if isinstance(rule, Rule):
        return rule if rule.scheme is None else dataclasses.replace(rule, scheme=as_scheme(rule.scheme))
    raise RuleError(f"a rule is a qjax.Rule or a pair (regex, scheme); got {item!r}")


def as_rules(given: Any) -> tuple[Rule, ...]:
    """Rules from what a user may write.

    Args:
      given: a scheme or its string (every layer but heads and embeddings), a `Rule`, a mapping `{regex: scheme}` or a
        sequence of rules and of pairs `(regex, scheme)`; None for a scheme leaves the layer alone.

    Raises:
      RuleError: for anything else, for no rule at all, and for a pattern that is no regular expression.
      SchemeError: for a scheme that does not exist.
    """
    if isinstance(given, Scheme | str):
        return (Rule(EVERYTHING, as_scheme(given)),)
    if isinstance(given, Rule):
        return (_as_rule(given),)
    items = tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(items, Sequence) or not items:
        raise RuleError(
            f"rules are a scheme, a qjax.Rule, a mapping or a sequence of them, at least one; got {given!r}"
        )
    return tuple(_as_rule(item) for item in items)


def parse_rules(text: str, where: str) -> tuple[Rule, ...]:
    """Rules from lines `regex scheme`; `none` leaves a layer alone, `#` begins a comment.

    Args:
      text: such as `.*/mlp/.* w4a16:group_size=64`, one rule a line.
      where: the file that errors name.

    Raises:
      RuleError: naming file and line.
    """
    rules = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = re.sub(r"(^|\s)#.*", "", line).rsplit(maxsplit=1)
        if not parts:
            continue
        if len(parts) != 2:
            raise RuleError(f"{where}, line {number}: {line.strip()!r} is not `regex scheme`")
        pattern, scheme = parts[0].strip(), parts[1]
        try:
            rules.append(Rule(pattern, None if scheme.lower() == "none" else as_scheme(scheme)))
        except (RuleError, SchemeError) as error:
            raise RuleError(f"{where}, line {number}: {error}") from error
    if not rules:
        raise RuleError(f"{where} holds no rule; a rule is a line `regex scheme`")
    return tuple(rules)


def match(rules: Sequence[Rule], path: str, kind: Kind = "dense") -> Rule | None:
    """The first rule that speaks of the layer at `path`, or None."""
    return next((rule for rule in rules if rule.matches(path, kind)), None)


@dataclasses.dataclass
class RuleUse:
    """Rules, and the record of what they matched: a rule that matches nothing is a mistake.

    Attributes:
      rules: in order.
      paths: every layer that was asked about.
      used: the rules that won somewhere.
      passed: layers that are not to be quantized -> why, in a few words; "" is that they are of another kind.
      unexplained: kernels that were left alone, since nobody told what their axes mean.
    """

    rules: tuple[Rule, ...]
    paths: list[str] = dataclasses.field(default_factory=list)
    used: set[Rule] = dataclasses.field(default_factory=set)
    passed: dict[str, str] = dataclasses.field(default_factory=dict)
    unexplained: list[str] = dataclasses.field(default_factory=list)

    def match(self, path: str, kind: Kind = "dense") -> Rule | None:
        """The rule of a layer that could be quantized, noted as used; None where no rule speaks of it."""
        self.paths.append(path)
        rule = match(self.rules, path, kind)
        if rule is not None:
            self.used.add(rule)
        return rule

    def pass_over(self, path: str, why: str = "") -> None:
        """Notes a layer that is not to be quantized (a norm, a convolution): only `none` can be said of it."""
        self.passed[path] = why or self.passed.get(path, "")
        rule = match(self.rules, path)
        if rule is not None and rule.scheme is None:
            self.used.add(rule)

    def check(self, where: str = "params") -> None:
        """Raises if a rule won nowhere.

        Raises:
          RuleError: naming the pattern, and what it might have meant: layers that an earlier rule took, or that are not
            to be quantized, with the reason, or some of those that can be.
        """
        for rule in self.rules:
            if rule not in self.used:
                raise RuleError(f"{where}: rule {rule.pattern!r} matches nothing{self._why(rule)}")

    def _why(self, rule: Rule) -> str:
        taken = [path for path in self.paths if re.fullmatch(rule.pattern, path)]
        before = self.rules[: self.rules.index(rule)]
        winner = next((w for w in (match(before, path) for path in taken) if w is not None), None)
        if winner is not None:
            return f" that is left: rule {winner.pattern!r} before it takes {', '.join(taken[:3])}"
        is_everything = rule.pattern == EVERYTHING
        passed = [
            f"{path!r} {why or 'is no layer that can be quantized'}"
            for path, why in self.passed.items()
            if re.fullmatch(rule.pattern, path) and (why or not is_everything)
        ]
        reasons = [", ".join(passed[:3])] if passed else []
        if is_everything and self.unexplained:
            reasons.append(
                f"the shape of {', '.join(self.unexplained[:3])} does not tell contracted from stacked axes: give "
                "model= and inputs=, or axis= and stacked= in a qjax.Rule that names it"
            )
        if taken:
            reasons.append(f"{', '.join(taken[:3])} are heads or embeddings, which a rule has to name")
        if not is_everything or not reasons:
            some = ", ".join(repr(path) for path in self.paths[:5]) or "none"
            more = f" and {len(self.paths) - 5} more" if len(self.paths) > 5 else ""
            law = "" if is_everything else "it has to match all of a path, and "
            reasons.append(f"{law}layers that can be quantized are {some}{more}")
        return f": {'; '.join(reasons)}"
