"""Measuring products: `qjax bench gemm`, `qjax tune`, and what the roofline predicts beside it."""

from .cases import Case as Case
from .cases import cases_of as cases_of
from .gemm import bench_gemm as bench_gemm
from .plot import plot_speedups as plot_speedups
from .plot import plot_tokens as plot_tokens
from .predict import Prediction as Prediction
from .predict import predict as predict
from .records import Results as Results
from .records import read_decode as read_decode
from .records import read_gemm as read_gemm
from .tuner import tune as tune
