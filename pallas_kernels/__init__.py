"""Pallas kernels, one a module: `triton/` for any GPU since Ampere, `mosaic/` for Hopper and up.

Every kernel module here and in `xla_ffi` offers the same three names, and dispatch calls no other:

- `unsupported(m, k, n, *, bits, group, cc, smem, ...) -> str | None`: why this kernel cannot run
  the product of `[m, k]` with `[k, n]`, in words for the user, or None where it can. It computes
  on plain values and runs nothing.
- `configs(m, k, n, *, ...)`: the configurations worth timing, each within the device's limits.
- `matmul(x, packed, scale, *, zero_point=None, ..., config) -> y`: `x` is `[m, k]`, the weight is
  stored by rows of `k` (`packed` `[n, ...]`, `scale` `[n, groups]`), `y` is `[m, n]`. Further
  arrays (`global_scale`, `codebook`, `x_scale`) come by keyword.

A kernel knows arrays and numbers only, never a QTensor, a module or a checkpoint: this package
imports jax and numpy alone, and losing a folder of it costs nothing but its rows in the registry.
"""
