"""Kernels for NVIDIA GPUs since Ampere, in Pallas lowered through Triton, a lowering that JAX has deprecated."""
