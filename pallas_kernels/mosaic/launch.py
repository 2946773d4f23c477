"""How kernels of warpgroups with roles are launched: programs in clusters, shared memory, barriers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def launch(
    body: Callable[..., None],
    out: Any,
    *,
    name: str,
    programs: int,
    warpgroups: int,
    scratch: Mapping[str, Any],
    cluster: int = 1,
    interpret: bool = False,
) -> Callable[..., Any]:
    """The kernel as a function of its operands; `body` gets their references, those of `out`, and `scratch` by name.

    Args:
      programs: or clusters, where these are of more than one program: axis `program` of `body`, then `cluster`.
      warpgroups: of a program, axis `warpgroup`.
    """
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(programs,),
        grid_names=("program",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=("cluster",) if cluster > 1 else (),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        scratch_types=scratch,
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )


def place_in(cluster: int) -> Any:
    """Which program of its cluster this is."""
    return jax.lax.axis_index("cluster") if cluster > 1 else 0


def shared_in(cluster: int) -> str | None:
    """The axis over which a copy is for all programs of a cluster, as `copy_gmem_to_smem` is told."""
    return "cluster" if cluster > 1 else None


def read_barriers(cluster: int, readers: int, stages: int) -> Any:
    """Barriers that say that a stage has been read, by all `readers` of all programs of a cluster."""
    if cluster == 1:
        return plgpu.Barrier(num_arrivals=readers, num_barriers=stages)
    return plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=readers, num_barriers=stages)


def slot_of(stage: Any, stages: int) -> jax.Array:
    """Where in a ring a stage lies."""
    return jax.lax.rem(stage, jnp.int32(stages))
