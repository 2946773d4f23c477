"""Kernels for NVIDIA GPUs since Ampere, in Pallas lowered through Triton. JAX has deprecated that lowering: the folder may go."""
