"""Kernels in plain JAX that XLA compiles into one or two fusions, on any GPU that it knows."""
