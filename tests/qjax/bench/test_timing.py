"""Wall time, and what a trace says of kernels."""

import jax
import jax.numpy as jnp
import pytest

from qjax.bench.programs import Effort, build
from qjax.bench.timing import busy_times, kernel_times, time_program

# Two annotations on the host. In the first, kernels of 2 and 3 us of which 1 us is shared, on two streams; in the
# second, one of 5 us. A line that is no stream, and a kernel outside of both.
TRACE = """
planes { id: 1 name: "/host:CPU"
  lines { id: 1 name: "python" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 }
    events { metadata_id: 2 offset_ps: 20000000 duration_ps: 10000000 } }
  event_metadata { key: 1 value { id: 1 name: "first" } }
  event_metadata { key: 2 value { id: 2 name: "second" } } }
planes { id: 2 name: "/device:GPU:0"
  lines { id: 1 name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 2000000 }
    events { metadata_id: 1 offset_ps: 21000000 duration_ps: 5000000 }
    events { metadata_id: 1 offset_ps: 40000000 duration_ps: 9000000 } }
  lines { id: 2 name: "Stream #14(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 2000000 duration_ps: 3000000 } }
  lines { id: 3 name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 10000000 } }
  event_metadata { key: 1 value { id: 1 name: "kernel" } } }
"""


def program(runs: int = 3):
    x = jnp.ones((4, 8))
    return build("dot", jnp.dot, [x, 2 * x], [jnp.ones((8, 4))] * 2, 1e-6, Effort(seconds=1e-5))


def test_a_timing_is_per_call_and_between_its_extremes() -> None:
    timing = time_program(program(), 5)
    assert 0 < timing.us_min <= timing.us <= timing.us_max


def test_busy_time_is_the_union_of_kernels_inside_each_annotation() -> None:
    data = jax.profiler.ProfileData
    profile = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(TRACE))
    assert busy_times(profile, ["first", "second", "never"]) == pytest.approx([4000, 5000, 0])


def test_where_the_profiler_sees_no_gpu_there_are_no_kernel_times() -> None:
    assert kernel_times([program(), program()]) == [None, None]


def test_a_profiler_that_is_taken_costs_kernel_times_only(tmp_path) -> None:
    with jax.profiler.trace(str(tmp_path)):
        assert kernel_times([program()]) == [None]
