"""What does training through quantized weights give back? On pylm-4m, on a CPU, in minutes.

QAT: kernels of 3 bits, trained to put out what the float model does (KL of the next token's distribution) on windows of
`calib.txt`, straight-through and with learned scales; judged as in `accuracy.py`. QLoRA: adapters beside NF4 weights,
trained on this project's pages (English, where the model knows Python), judged on its pages about kernels. Prints as it
goes and writes `results/training-<device>.json`.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accuracy import MODEL, ROOT, WINDOWS, environment
from flax import nnx

import qjax
import qjax.nnx
from qjax import devices
from qjax.calibration import windows
from qjax.checkpoints.load import load
from qjax.dispatch.tuning import file_name
from qjax.models import load_tokenizer, perplexity

QAT_STEPS, QAT_RATE = 200, 2e-4
LORA_STEPS, LORA_RATE, RANK = 150, 3e-3, 8
WINDOW, BATCH = 256, 4

STRAIGHT, LEARNED = "w3a16", "w3a16:symmetric=true"


def in_float32(model: nnx.Module) -> Any:
    """The model with params that small steps can change."""
    nnx.update(model, jax.tree.map(lambda a: a.astype(jnp.float32), nnx.state(model, nnx.Param)))
    return model


def batches_of(ids: list[int], steps: int) -> list[np.ndarray]:
    """Batches `[BATCH, WINDOW]` of so many steps, over the text again and again, each time in a new order."""
    rows = np.concatenate(windows(ids, window=WINDOW, count=len(ids), batch_size=1))
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * BATCH // len(rows)))])
    return [rows[order[i * BATCH : (i + 1) * BATCH]] for i in range(steps)]


def train_kernels(base: Any, scheme: str, scales: Any, batches: list[np.ndarray]) -> tuple[Any, list[float]]:
    """The model quantized after training its kernels, and their scales where there are any; the loss of each step."""
    student = in_float32(nnx.clone(base))
    graph, params, rest = nnx.split(student, nnx.Param, ...)
    teacher, state = nnx.split(base)
    optimizer = optax.adam(optax.cosine_decay_schedule(QAT_RATE, len(batches)))

    @jax.jit
    def step(trained: Any, moments: Any, ids: jax.Array) -> Any:
        wanted = jax.nn.log_softmax(nnx.merge(teacher, state)(ids))

        def loss(trained: Any) -> jax.Array:
            model = nnx.merge(graph, trained["params"], rest)
            logits = qjax.nnx.fake_quantize(model, scheme, scales=trained["scales"])(ids)
            return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits)), axis=-1))

        value, gradients = jax.value_and_grad(loss)(trained)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(trained, updates), moments, value

    trained: Any = {"params": params, "scales": scales}
    moments, losses = optimizer.init(trained), []
    for ids in batches:
        trained, moments, value = step(trained, moments, ids)
        losses.append(float(value))
    nnx.update(student, trained["params"])
    return qjax.nnx.quantize(student, scheme, scales=trained["scales"]), losses


def train_adapters(model: Any, batches: list[np.ndarray]) -> list[float]:
    """Trains the adapters in place; the loss of each step."""
    optimizer = nnx.Optimizer(model, optax.adam(LORA_RATE), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model: Any, optimizer: Any, ids: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(ids)[:, :-1], ids[:, 1:]).mean()

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer, ids)) for ids in batches]


def main() -> None:
    """Runs everything, prints as it goes, writes the results."""
    tokenizer = load_tokenizer(MODEL)

    def tokens(*files: Any) -> list[int]:
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        return tokenizer.encode(text, add_special_tokens=False)

    calib, held_out = tokens(MODEL / "calib.txt"), tokens(MODEL / "eval.txt")
    pages, of_kernels = (tokens(*sorted(folder.glob("*.md"))) for folder in (ROOT / "docs", ROOT / "docs" / "kernels"))
    out = ROOT / "benchmarks" / "results" / file_name(f"training-{devices.current().name}")
    base = in_float32(load(MODEL, dtype="float32"))
    rows: list[dict[str, Any]] = []

    def record(what: str, scheme: str, model: Any, text: list[int], *, losses: Any = None, start: Any = None) -> None:
        found = perplexity(model, text, base=base, max_windows=WINDOWS)
        row: dict[str, Any] = dict(what=what, scheme=scheme, perplexity=found.perplexity, kl=found.kl, top1=found.top1)
        row |= {} if start is None else dict(seconds=time.perf_counter() - start, losses=losses)
        rows.append(row)
        print(json.dumps(row | dict(losses=None)), flush=True)
        document = {**environment(), "windows": WINDOWS, "window": WINDOW, "batch": BATCH, "rows": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")

    for scheme in (STRAIGHT, LEARNED):
        record("nearest", scheme, qjax.nnx.quantize(nnx.clone(base), scheme), held_out)
    for what, scheme in (("straight-through", STRAIGHT), ("learned scales", LEARNED)):
        start = time.perf_counter()
        scales = None
        if scheme == LEARNED:
            scales = qjax.nnx.scales_of(qjax.calibrate(nnx.clone(base), None, "mse", scheme))
        model, losses = train_kernels(base, scheme, scales, batches_of(calib, QAT_STEPS))
        record(what, scheme, model, held_out, losses=losses, start=start)

    record("base", "float32", base, of_kernels)
    model = qjax.nnx.quantize(nnx.clone(base), "nf4:double_quant=true")
    record("frozen", "nf4:double_quant=true", model, of_kernels)
    start = time.perf_counter()
    qjax.nnx.add_lora(model, RANK, rngs=nnx.Rngs(0))
    losses = train_adapters(model, batches_of(pages, LORA_STEPS))
    record("adapters kept", "nf4:double_quant=true", model, of_kernels, losses=losses, start=start)
    for scheme in ("nf4:double_quant=true", "w8a16"):
        record("adapters merged", scheme, qjax.nnx.merge_lora(nnx.clone(model), scheme), of_kernels)


if __name__ == "__main__":
    main()
