"""Which kernel runs the weights of each checkpoint format, by device: dispatch's own answer, as a Markdown table.

Nothing is measured here. `benchmarks.quote` puts the table into the page that has it. Kernels in C++ are left out,
since whether they are built and find their libraries depends on the machine.
"""

import functools

import jax
import jax.numpy as jnp

import qjax
from qjax.devices import find_device
from qjax.dispatch import ROUTES
from qjax.dispatch.choose import choose
from qjax.formats import FORMATS
from qjax.kernel_call import problem_of

DEVICES = ("A100", "H100", "H200", "CPU")
ROWS_OF_X = (1, 512)  # a token, a prompt
SIZE = 4096
PORTABLE = tuple(route for route in ROUTES if not route.module.startswith("xla_ffi."))

# Formats, bits, scheme.
WEIGHTS = (
    ("GPTQ, AWQ, compressed-tensors, HQQ, GGUF", "4", "w4a16"),
    ("the same with zero points", "4", "w4a16:symmetric=false"),
    ("GPTQ, compressed-tensors, HQQ", "3", "w3a16"),
    ("GPTQ, compressed-tensors, HQQ", "2", "w2a16"),
    ("compressed-tensors, HQQ", "5", "w5a16"),
    ("compressed-tensors, HQQ", "6", "w6a16"),
    ("LLM.int8, compressed-tensors", "8", "w8a16"),
    ("GPTQ, compressed-tensors, HQQ, GGUF", "8", "w8a16:group_size=128"),
    ("compressed-tensors W8A8", "8", "w8a8_int8"),
    ("compressed-tensors W4A8", "4", "w4a8_int8"),
    ("compressed-tensors FP8, a scale a row", "8", "w8a8_fp8"),
    ("compressed-tensors and `fp8`, static", "8", "w8a8_fp8:granularity=tensor,activation=tensor,mode=static"),
    ('the same, `activations="none"`', "8", "fp8"),
    ("`fp8`, blocks", "8", "w8a8_fp8:granularity=block,activation=block"),
    ('the same, `activations="none"`', "8", "fp8:granularity=block"),
    ("bitsandbytes NF4, FP4", "4", "nf4"),
    ("the same, double", "4", "nf4:double_quant=true"),
    ("compressed-tensors and gpt-oss MXFP4", "4", "mxfp4"),
    ("compressed-tensors NVFP4", "4", "nvfp4"),
    ("compressed-tensors MXFP8", "8", "mxfp8"),
)


def kernel(scheme: str, device: str, m: int) -> str:
    """The route of a product of `m` rows in bfloat16."""
    quantize = functools.partial(qjax.quantize_array, scheme=scheme)
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16))
    outside = jnp.dtype(jnp.bfloat16)
    inside = FORMATS[w.scheme.activation.format].dtype if w.scheme.activation else outside
    problem = problem_of(w, m=m, x_dtype=inside, out_dtype=outside)
    return choose(problem, find_device(device), backend="auto", routes=PORTABLE).route.name


def kernel_table() -> str:
    """The table, a line a format; two kernels in a cell are for a token and for a prompt."""
    heads = ("format", "bits", "scheme", *DEVICES)
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for formats, bits, scheme in WEIGHTS:
        kernels = [dict.fromkeys(kernel(scheme, device, m) for m in ROWS_OF_X) for device in DEVICES]
        cells = [" / ".join(f"`{name}`" for name in names) for names in kernels]
        lines.append(" | ".join((formats, bits, f"`{scheme}`", *cells)))
    return "".join(f"| {line} |\n" for line in lines)
