"""Tuning: the fastest right configuration wins, is written at once, and is not looked for again."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qjax.bench import tuner
from qjax.bench.operands import Operands
from qjax.bench.programs import Effort
from qjax.bench.timing import Timing
from qjax.bench.tuner import configs_of, tasks_of, tune, tune_one
from qjax.dispatch import tuning
from qjax.dispatch.routes import ROUTES, Route
from qjax.errors import QJaxError
from qjax.layouts import unpack
from qjax.schemes import W4A16, W8A16

TINY = Effort(seconds=1e-4, most_calls=4, runs=2, weights=2)


def right(x: jax.Array, packed: jax.Array, scale: jax.Array, **_: Any) -> jax.Array:
    codes = unpack(packed, 4).astype(jnp.float32) - 8
    return (x.astype(jnp.float32) @ (codes * jnp.repeat(scale.astype(jnp.float32), 128, axis=1)).T).astype(x.dtype)


def kernel(x: jax.Array, packed: jax.Array, scale: jax.Array, *, config: dict[str, int], **_: Any) -> jax.Array:
    """Right but for tile 2, which is wrong, and for tile 3, which does not compile."""
    if config.get("tile") == 3:
        raise NotImplementedError("no tile of 3")
    return right(x, packed, scale) * (1.5 if config.get("tile") == 2 else 1)


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch) -> Route:
    module = types.ModuleType("pallas_kernels.xla.fake")
    vars(module).update(
        matmul=kernel,
        unsupported=lambda m, k, n, **_: None,
        configs=lambda m, k, n, **_: [{"tile": i} for i in range(6)],
    )
    monkeypatch.setitem(sys.modules, "fake_kernels", types.ModuleType("fake_kernels"))
    monkeypatch.setitem(sys.modules, "fake_kernels.fake", module)
    return Route("xla.fake", "xla", "fake_kernels.fake")


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Microseconds by order of compilation: the kernel's own choice, then tiles 0, 1, 2, ..."""
    fake = {0: 9.0, 1: 8.0, 2: 5.0, 3: 1.0, 4: 7.0, 5: 6.0, 6: 8.5}
    built: list[Any] = []
    whole = tuner.build_all

    def build_all(builders: Any) -> Any:
        built[:] = whole(builders)
        return built

    def time_program(program: Any, runs: int) -> Timing:
        us = fake[next(i for i, p in enumerate(built) if p is program)]
        return Timing(us, us, us)

    monkeypatch.setattr(tuner, "build_all", build_all)
    monkeypatch.setattr(tuner, "time_program", time_program)
    return fake


def task(route: Route) -> tuner.Task:
    return tuner.Task(route, W4A16(), 2, 32, 128)


def test_the_fastest_that_is_right_wins(route: Route, times: dict[int, float]) -> None:
    entry = tune_one(task(route), Operands(32, 128, TINY))
    assert entry is not None  # tile 2 is the fastest and wrong, tile 3 does not compile
    assert (entry.kernel, entry.config, entry.microseconds) == ("xla.fake", (("tile", 1),), 5.0)
    assert (entry.scheme, entry.n, entry.k, entry.m) == ("w4a16:group_size=128", 32, 128, 2)


def test_the_kernels_own_choice_may_win(route: Route, times: dict[int, float]) -> None:
    times[0] = 0.5
    entry = tune_one(task(route), Operands(32, 128, TINY))
    assert entry is not None and entry.config == ()


def test_a_few_configurations_are_spread_over_all(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tuner.product_of(W4A16(), 2, 32, 128, jnp.float32)
    assert configs_of(task(route), problem, 3) == [{}, {"tile": 0}, {"tile": 2}, {"tile": 4}]
    assert len(configs_of(task(route), problem, None)) == 7
    assert len(configs_of(task(route), problem, 100)) == 7


def test_winners_are_written_at_once_and_not_looked_for_again(tmp_path: Path) -> None:
    tasks = tasks_of([W4A16(), W8A16()], [1, 3], [(32, 128)], ["xla.reference"])
    assert [t.m for t in tasks] == [1, 1, 4, 4]  # buckets
    found: list[Any] = []
    assert tune(tasks[:1], directory=tmp_path, effort=TINY, report=found.append) == 0
    assert len(json.loads((tmp_path / "cpu.json").read_text())["entries"]) == 1
    assert tune(tasks, directory=tmp_path, effort=TINY, report=found.append) == 0
    assert [entry.key + (entry.m,) for entry in found] == [t.key for t in tasks]
    assert tune(tasks, directory=tmp_path, effort=TINY, report=found.append) == 0 and len(found) == 4
    assert all(entry.microseconds > 0 for entry in found)


def test_without_time_everything_is_left(tmp_path: Path) -> None:
    tasks = tasks_of([W4A16()], [1], [(32, 128)])
    assert tune(tasks, directory=tmp_path, effort=TINY, budget=0.0) == len(tasks)
    assert list(tmp_path.iterdir()) == []


FOREIGN = {
    "no JSON": ("mine", "Expecting value"),
    "another device's": ('{"version": 1, "device": "H200", "entries": []}', "it is for 'H200', this is 'CPU'"),
    "an older one": ('{"version": 0, "device": "CPU", "entries": []}', "its version is 0"),
}


@pytest.mark.parametrize(("text", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_no_table_of_this_device_is_not_written_over(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    with pytest.raises(QJaxError, match=f"cpu.json: is no tuning table for CPU: {reason}"):
        tune(tasks_of([W4A16()], [1], [(32, 128)]), directory=tmp_path, effort=TINY)
    assert (tmp_path / "cpu.json").read_text() == text


def test_an_unknown_route_is_named_with_the_known_ones() -> None:
    with pytest.raises(QJaxError, match="unknown route 'triton.magic'; known: .*xla.reference"):
        tasks_of([W4A16()], [1], [(32, 128)], ["triton.magic"])


def test_a_table_that_was_written_is_read_by_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QJAX_TUNING_DIR", str(tmp_path))
    tune(tasks_of([W4A16()], [2], [(32, 128)], ["xla.reference"]), effort=TINY)
    entry = tuning.read("CPU").nearest("xla.reference", "w4a16:group_size=128", 32, 128, 2)
    assert entry is not None and entry.m == 2 and ROUTES
