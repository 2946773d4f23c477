"""The version, in its one place: the build reads it here, and `qjax.__version__` is this name."""

__version__ = "0.1.0"
