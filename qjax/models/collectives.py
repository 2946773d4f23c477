"""How XLA launches the sums over devices that each layer of a decode step ends in, on several GPUs.

By itself XLA sums with a kernel of its own outside of the step's CUDA graph, and the devices idle before and after it.
With NCCL's, in the graph, a step of Llama 2 70B on two H200s is a tenth shorter (docs/decode.md).
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

_GRAPHS, _KERNELS = "xla_gpu_enable_command_buffer", "xla_gpu_experimental_use_collective_kernels"
# What belongs into a graph: XLA's own choice, and collectives. Which of those XLA has kernels for: none, NCCL has.
OPTIONS = {
    _GRAPHS: "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,COLLECTIVES",
    _KERNELS: "",
}


def in_graph(state: Any) -> bool:
    """Whether a program over these arrays is compiled with `OPTIONS`: on several GPUs, unless XLA_FLAGS choose."""
    devices = {device for leaf in jax.tree.leaves(state) for device in leaf.sharding.device_set}
    chosen = os.environ.get("XLA_FLAGS", "")
    if len(devices) == 1 or any(device.platform != "gpu" for device in devices):
        return False
    return _GRAPHS not in chosen and _KERNELS not in chosen and _known()


@functools.cache
def _known() -> bool:
    """Whether this XLA knows the options."""
    try:
        jax.jit(lambda: jnp.int32(0), compiler_options=OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning("sums over devices stay outside of CUDA graphs: %s", error)
        return False
    return True
