"""Tokens a second: what is measured, what a record says, and what is left out with its reason."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from qjax.bench import models
from qjax.bench.decode import Subject, bench_decode, bound_of, breakdown, decode_cases
from qjax.bench.records import Results, read
from qjax.bench.timing import count_kernels
from qjax.cli.main import main
from qjax.models.merge import MergedLinear
from qjax.qtensor import QTensor
from qjax.schemes import W4A16, W8A16

MACHINE = {"device": "CPU", "jax": jax.__version__, "jaxlib": "", "bandwidth": 1e10}
BILLIONS = {"llama-3.2-1b": 1.24, "llama-2-7b": 6.74, "llama-3-8b": 8.03, "llama-2-13b": 13.0, "llama-2-70b": 69.0}
TINY = dataclasses.replace(
    models.GEOMETRIES["llama-3-8b"],
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope=dataclasses.replace(models.GEOMETRIES["llama-3-8b"].rope, dim=64),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.GEOMETRIES, "tiny", TINY)


def test_published_geometries_have_as_many_weights_as_their_names_say() -> None:
    for name, billions in BILLIONS.items():
        c = models.GEOMETRIES[name]
        attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
        layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        total = c.num_hidden_layers * layer + tables + c.hidden_size
        assert total == pytest.approx(billions * 1e9, rel=0.005), name


def test_a_random_model_has_merged_layers_of_the_scheme_and_a_dense_head() -> None:
    model = models.model_of("tiny", W4A16(group_size=64), jnp.bfloat16)
    (layer,) = model.layers
    assert isinstance(layer.self_attn.qkv_proj, MergedLinear) and isinstance(layer.mlp.gate_up_proj, MergedLinear)
    kernel = layer.mlp.gate_up_proj.linear.kernel.get_value()
    assert isinstance(kernel, QTensor) and kernel.shape == (256, 1024) and kernel.scheme == W4A16(group_size=64)
    assert model.lm_head.kernel.get_value().dtype == jnp.bfloat16
    logits = model(jnp.arange(8)[None])
    assert jnp.isfinite(logits).all() and 0.1 < jnp.std(logits) < 10


def test_a_model_cut_over_two_devices_gives_the_logits_of_one() -> None:
    mesh = jax.make_mesh((2,), ("model",))
    scheme = W4A16(group_size=64)
    alone, cut = (models.model_of("tiny", scheme, jnp.float32, m) for m in (None, mesh))
    kernel = cut.layers[0].mlp.down_proj.kernel.get_value()
    assert kernel.packed.addressable_shards[0].data.size * 2 == kernel.packed.size
    ids = jnp.arange(8)[None]
    assert jnp.abs(cut(ids) - alone(ids)).max() < 1e-3


def test_records_stand_beside_the_dense_model_and_a_run_goes_on(tmp_path) -> None:
    path = tmp_path / "decode.json"
    cases = decode_cases(["tiny", "no such folder"], [W8A16()], [1, 2], [8])
    results = Results(path, MACHINE, "abc")
    told: list[dict] = []
    assert bench_decode(cases, results, steps=4, runs=2, report=told.append)
    records = read(path)["records"]
    assert [(r["scheme"], r["batch"]) for r in records] == [("dense", 1), ("dense", 2), ("w8a16", 1), ("w8a16", 2)]
    assert len(told) == 4
    dense, quantized = records[0], records[2]
    assert quantized["speedup"] == pytest.approx(quantized["tok_s"] / dense["tok_s"], rel=1e-4)
    assert quantized["bf16_tok_s"] == dense["tok_s"] and dense["speedup"] is None
    assert quantized["tok_s"] == pytest.approx(1e6 / quantized["step_us"], rel=1e-4)
    assert quantized["weight_bytes"] < dense["weight_bytes"] < dense["peak_bytes"]
    assert dense["cache_bytes"] == 2 * (8 + 4) * 2 * 64 * 4 + 4  # keys, values, lengths
    assert {f["model"] for f in results.failures} == {"no such folder"}
    assert "neither a folder nor one of llama-3.2-1b" in results.failures[0]["error"]
    told.clear()
    assert bench_decode(cases, Results(path, MACHINE, "abc"), steps=4, runs=2, report=told.append)
    assert told == []


def test_an_int8_cache_is_measured_beside_a_dense_model_with_its_own(tmp_path) -> None:
    results = Results(tmp_path / "decode.json", MACHINE, "abc")
    assert bench_decode(decode_cases(["tiny"], [W8A16()], [1], [8], cache="int8"), results, steps=4, runs=2)
    dense, coded = results
    assert (dense["cache"], coded["cache"]) == ("dense", "int8")
    assert coded["bf16_tok_s"] == dense["tok_s"]
    assert coded["cache_bytes"] == 2 * (8 + 4) * 2 * (64 + 4) + 4  # keys, values, each with a scale; lengths


def test_a_step_reads_kernels_and_head_but_not_the_embedding() -> None:
    (case, _) = decode_cases(["tiny"], [W8A16()], [1], [8])
    subject = Subject.of(case)
    embedding = 64 * 256 * 4
    norms = 3 * 256 * 4
    assert subject.weight_bytes - subject.step_bytes == embedding + norms


TRACE = """
planes { id: 2 name: "/device:GPU:0"
  lines { id: 1 name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 2000000 }
    events { metadata_id: 3 offset_ps: 6000000 duration_ps: 4000000 }
    events { metadata_id: 2 offset_ps: 2000000 duration_ps: 5000000 } }
  lines { id: 3 name: "XLA Modules" events { metadata_id: 1 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "loop_add_fusion_3" } }
  event_metadata { key: 2 value { id: 2 name: "matmul_packed" } }
  event_metadata { key: 3 value { id: 3 name: "loop_add_fusion_12_1" } } }
planes { id: 3 name: "/device:GPU:1"
  lines { id: 1 name: "Stream #13(Compute)" events { metadata_id: 1 duration_ps: 7000000 } }
  event_metadata { key: 1 value { id: 1 name: "matmul_packed" } } }
"""


def test_kernels_of_one_name_are_counted_together_on_the_first_gpu_and_no_time_twice() -> None:
    """The second fusion begins a microsecond before the product ends."""
    data = jax.profiler.ProfileData
    kernels = count_kernels(data.from_serialized_xspace(data.text_proto_to_serialized_xspace(TRACE)), 2)
    assert [(k["name"], k["launches"]) for k in kernels] == [("loop_add_fusion", 1), ("matmul_packed", 0.5)]
    assert [k["us"] for k in kernels] == pytest.approx([2.5, 2.5])
    *_, rest = breakdown(kernels, 8)
    assert rest == ("between kernels", 0, pytest.approx(3), pytest.approx(3 / 8))


@pytest.mark.parametrize(
    ("step", "memory", "said"),
    [
        (
            100.0,
            0.8,
            "takes 80 us at the copy bandwidth, 80% of it; 3 kernels, and 30 us between them: bound by memory",
        ),
        (100.0, 0.3, "bound by its kernels, matmul first (60%)"),
        (300.0, 0.1, "230 us between them: bound by launches"),
    ],
)
def test_a_step_is_bound_by_bytes_kernels_or_what_lies_between(step: float, memory: float, said: str) -> None:
    kernels = [{"name": "norm", "launches": 2, "us": 10.0}, {"name": "matmul", "launches": 1, "us": 60.0}]
    assert said in bound_of({"step_us": step, "share_of_bandwidth": memory, "kernels": kernels})


def test_the_command_prints_a_table_and_says_where_there_is_no_breakdown(capsys, tmp_path) -> None:
    sizes = ("--batches", "1", "--prompts", "8", "--steps", "2", "--schemes", "w8a16", "--cache", "fp8")
    files = ("--json", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png"))
    assert main(("bench", "decode", "--models", "tiny", *sizes, *files, "--explain")) == 0
    out, err = capsys.readouterr()
    assert "us at the copy bandwidth" in out and (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert "w8a16" in out and "dense" in out and "no profiler here tells kernels apart" in out and err == ""
    assert json.loads((tmp_path / "d.json").read_text())["records"][1]["scheme"] == "w8a16"
    assert main(("bench", "decode", "--models", "tiny", *sizes, "--alone", "--json", str(tmp_path / "e.json"))) == 0
    (record,) = json.loads((tmp_path / "e.json").read_text())["records"]
    assert record["scheme"] == "w8a16" and record["speedup"] is None
