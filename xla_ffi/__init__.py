"""Compiled kernels behind XLA's foreign function interface, a folder per library: C++ and wrapper.

The wrappers follow the calling convention that `pallas_kernels` documents:
`unsupported(m, k, n, *, ...) -> str | None`, `configs(m, k, n, *, ...)` and
`matmul(x, packed, scale, *, zero_point=None, ..., config)`. They know arrays and numbers only and
import jax and numpy alone, never `qjax`.

A shared library is found and registered at the first call, not at import. Handlers neither allocate
nor synchronize on the host, so that a CUDA graph can hold them.
"""
