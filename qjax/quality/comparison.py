"""Comparison: what was measured of a model beside its base, as arrays, as figures of merit and as JSON.

SQNR is the ratio of signal to quantization noise in decibels, `10 log10(sum y^2 / sum (y' - y)^2)`, y being the base's
outputs and y' the model's; infinite where they are equal. KL is in nats.
"""

import dataclasses
import math
from typing import Any

import numpy as np

TINY = float(np.finfo(np.float32).tiny)  # a channel that is always 0 in the base has this signal
QUANTILES = (0.5, 0.9, 0.99, 0.999)
LAYER_COLUMNS = ("layer", "base", "model", "SQNR dB", "by itself", "noisiest outputs", "outliers of x")


def decibels(signal: float, noise: float) -> float:
    """SQNR; infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, TINY) / noise)


@dataclasses.dataclass(frozen=True)
class Channel:
    """One output of a layer: its SQNR, and its share of the layer's noise."""

    channel: int
    sqnr: float
    share: float


@dataclasses.dataclass(frozen=True, eq=False)
class LayerComparison:
    """A layer that is quantized in one of the models. Channels are the last axis of what it puts out, or takes in.

    Attributes:
      path: of the module.
      base_scheme, scheme: in the base and in the model; None where it is float.
      signal: sum of y^2 over tokens, float64 `[N]`.
      noise: sum of (y' - y)^2, each model on its own input: what this layer and all before it have done, `[N]`.
      own_noise: the same with the model's layer on the base's input: what this layer alone does, `[N]`.
      input_peak: max |x| over tokens of what enters it in the base, `[K]`; None for a table, which is looked up.
      input_power: mean of x^2, `[K]`; None for a table.
    """

    path: str
    base_scheme: str | None
    scheme: str | None
    signal: np.ndarray
    noise: np.ndarray
    own_noise: np.ndarray
    input_peak: np.ndarray | None
    input_power: np.ndarray | None

    @property
    def sqnr(self) -> float:
        """Of all outputs together, in dB."""
        return decibels(self.signal.sum(), self.noise.sum())

    @property
    def own_sqnr(self) -> float:
        """The same of the layer by itself."""
        return decibels(self.signal.sum(), self.own_noise.sum())

    def channel_sqnr(self) -> np.ndarray:
        """Of each output by itself on the base's input, `[N]`."""
        return np.array([decibels(s, n) for s, n in zip(self.signal, self.own_noise, strict=True)])

    def worst(self, count: int) -> list[Channel]:
        """The outputs that bring most of the layer's own noise, the first the most; none where there is no noise."""
        total = float(self.own_noise.sum())
        first = np.argsort(-self.own_noise, kind="stable")[:count]
        rows = ((int(i), float(self.signal[i]), float(self.own_noise[i])) for i in first)
        return [Channel(i, decibels(signal, noise), noise / total) for i, signal, noise in rows if noise]

    def outliers(self) -> np.ndarray | None:
        """max |x| of each input channel over the root mean square of all of x, `[K]`; None for a table."""
        if self.input_peak is None or self.input_power is None:
            return None
        return self.input_peak / max(math.sqrt(self.input_power.mean()), TINY)

    def largest(self, count: int) -> list[tuple[int, float]]:
        """The inputs that are largest by `outliers`, the first the largest; none of a table."""
        ratios = self.outliers()
        if ratios is None:
            return []
        return [(int(i), float(ratios[i])) for i in np.argsort(-ratios, kind="stable")[:count]]

    def cells(self, count: int) -> tuple[str, ...]:
        """A row under `LAYER_COLUMNS` that names so many channels of each kind."""
        return (
            self.path,
            self.base_scheme or "float",
            self.scheme or "float",
            _text(self.sqnr),
            _text(self.own_sqnr),
            ", ".join(f"{one.channel} ({one.share:.1%})" for one in self.worst(count)),
            ", ".join(f"{channel} ({ratio:.1f}x)" for channel, ratio in self.largest(count)),
        )

    def to_json(self, count: int) -> dict[str, Any]:
        """Its figures, and `count` channels of each kind; an infinite SQNR is null."""
        return {
            "path": self.path,
            "base_scheme": self.base_scheme,
            "scheme": self.scheme,
            "sqnr_db": _finite(self.sqnr),
            "own_sqnr_db": _finite(self.own_sqnr),
            "worst_channels": [
                {"channel": one.channel, "sqnr_db": _finite(one.sqnr), "share": one.share} for one in self.worst(count)
            ],
            "outlier_inputs": [{"channel": i, "peak_over_rms": ratio} for i, ratio in self.largest(count)],
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A model beside its base on the same windows of a text.

    Attributes:
      base_nll, nll: negative log-likelihood of each prediction in nats, float32 `[windows, window - 1]`.
      kl: KL(base || model) of each, the same shape.
      agreed: whether both have the same likeliest token, the same shape.
      layers: those quantized in either model, in the order of the model.
    """

    base_nll: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    agreed: np.ndarray
    layers: tuple[LayerComparison, ...]

    @property
    def base_perplexity(self) -> float:
        """exp of the mean of `base_nll`."""
        return math.exp(self.base_nll.mean(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean of `nll`."""
        return math.exp(self.nll.mean(dtype=np.float64))

    @property
    def mean_kl(self) -> float:
        """Over all predictions."""
        return float(self.kl.mean(dtype=np.float64))

    @property
    def top1(self) -> float:
        """Share of predictions with the same likeliest token."""
        return float(self.agreed.mean(dtype=np.float64))

    def worst_tokens(self, count: int) -> list[tuple[int, int, float]]:
        """Where the models differ most: window, position of the token that is predicted, KL."""
        order = np.argsort(-self.kl, axis=None, kind="stable")[:count]
        places = zip(*np.unravel_index(order, self.kl.shape), strict=True)
        return [(int(window), int(token) + 1, float(self.kl[window, token])) for window, token in places]

    def to_json(self, count: int = 8) -> dict[str, Any]:
        """All figures of merit as what `json` writes: `count` worst tokens, and channels of each layer."""
        return {
            "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity,
            "kl": self.mean_kl,
            "kl_max": float(self.kl.max()),
            "kl_quantiles": {f"{q:g}": float(np.quantile(self.kl, q)) for q in QUANTILES},
            "top1": self.top1,
            "windows": len(self.kl),
            "tokens": self.kl.size,
            "worst_tokens": [
                {"window": window, "position": position, "kl": kl} for window, position, kl in self.worst_tokens(count)
            ],
            "layers": [layer.to_json(count) for layer in self.layers],
        }


def _text(sqnr: float) -> str:
    return "exact" if math.isinf(sqnr) else f"{sqnr:.1f}"


def _finite(sqnr: float) -> float | None:
    """JSON has no infinity."""
    return sqnr if math.isfinite(sqnr) else None
