"""Which programs have their sums over devices in the graph: those over several GPUs, unless the user chose."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from qjax.models import collectives


class _Device:
    def __init__(self, platform: str) -> None:
        self.platform = platform


def over(*platforms: str) -> list[SimpleNamespace]:
    """A model's state on devices of these platforms."""
    return [SimpleNamespace(sharding=SimpleNamespace(device_set=set(map(_Device, platforms))))]


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_sums_are_in_the_graph_on_several_gpus_alone(monkeypatch):
    monkeypatch.setattr(collectives, "_known", lambda: True)
    assert collectives.in_graph(over("gpu", "gpu"))
    assert not collectives.in_graph(over("gpu"))
    assert not collectives.in_graph(over("cpu", "cpu"))
    assert not collectives.in_graph({"a": jnp.zeros(2)})


def test_flags_of_the_user_stand(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    assert not collectives.in_graph(over("gpu", "gpu"))


def test_an_xla_that_does_not_know_the_options_goes_without(monkeypatch):
    monkeypatch.setattr(collectives, "OPTIONS", {"xla_gpu_enable_command_buffer": "NOTHING_OF_THE_SORT"})
    collectives._known.cache_clear()
    try:
        assert not collectives.in_graph(over("gpu", "gpu"))
    finally:
        collectives._known.cache_clear()


@pytest.mark.skipif(not jax.__version__.startswith("0.11."), reason="the options are this XLA's")
def test_a_program_compiles_with_them():
    assert collectives._known()
    program = jax.jit(lambda x: x + 1, compiler_options=collectives.OPTIONS)
    assert program(jnp.int32(1)) == 2
