"""Exceptions a user may catch. Every one is a ValueError whose message says what, where, got and allowed.

A lawful request that QJAX does not serve yet is a plain NotImplementedError; a failed `assert` is a bug of ours.
"""


class QJaxError(ValueError):
    """The caller's mistake: base class of everything QJAX raises on bad input."""


class SchemeError(QJaxError):
    """An unknown scheme, or options that no scheme has."""


class RuleError(QJaxError):
    """A quantization rule that is malformed, or that matches nothing."""


class QuantizeError(QJaxError):
    """A weight that cannot be quantized as asked: rank, dtype, group size, NaN or inf."""


class QTensorError(QJaxError):
    """A QTensor whose arrays disagree with each other or with their scheme."""


class BackendError(QJaxError):
    """A backend that does not exist, or that cannot run the problem it was forced on."""


class ShardingError(QJaxError):
    """A partition that cuts a packed block or a scale group, or a mesh that is not supported."""


class CheckpointError(QJaxError):
    """A checkpoint folder, file, index, config or tensor that is malformed, foreign or missing."""


class CalibrationError(QJaxError):
    """Data that calibration cannot use, a recipe that does not exist, or one that does not fit the scheme."""


class GenerationError(QJaxError):
    """A prompt or a sampling setting that the model cannot serve."""
