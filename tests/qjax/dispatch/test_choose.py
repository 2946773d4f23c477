"""Which kernel is chosen and why, with routes and kernel packages made up for the purpose."""

import sys
import threading

import chex
import jax
import numpy as np
import pytest
from absl.testing import parameterized

from qjax.devices import TABLE, find_device
from qjax.dispatch import backends, tuning
from qjax.dispatch.choose import ABSENT, choose, facts, load, possible, refusal, use
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import ROUTES, Route
from qjax.errors import BackendError, QJaxError
from qjax.schemes import NF4, W4A16, W8A8Int8

BF16 = np.dtype("bfloat16")
H200, A100, CPU = find_device("H200"), find_device("A100"), find_device("CPU")
GPU = frozenset({"gpu"})
INT4 = frozenset({"int4"})

KERNELS = {
    "picky": "def unsupported(m, k, n, *, group, smem, **_):\n"
    "    if k % group: return f'group {group} does not divide k={k}'\n"
    "    if smem < 200 * 1024: return f'it needs 200 KiB of shared memory, there are {smem}'\n",
    "willing": "def unsupported(m, k, n, **_): return None\n",
    "other": "def unsupported(m, k, n, **_): return None\n",
    "broken": "import jax.a_part_that_was_removed\n",
}

REFERENCE = ROUTES[0]
PICKY = Route(
    "mosaic.picky", "mosaic", "made_up_kernels.hopper.picky",
    INT4, platforms=GPU, cc_min=90, cc_max=90, features=frozenset({"zero_point"}),
)  # fmt: skip
WILLING = Route("triton.willing", "triton", "made_up_kernels.hopper.willing", INT4, platforms=GPU, cc_min=80)
OTHER = Route("triton.other", "triton", "made_up_kernels.hopper.other", INT4, platforms=GPU, cc_min=80)
BROKEN = Route("triton.broken", "triton", "made_up_kernels.hopper.broken", platforms=GPU)
GONE = Route("cublaslt.gone", "cublaslt", "made_up_kernels.deleted.gone", platforms=GPU)
LEFT_OVER = Route("cpu.left", "cpu", "made_up_kernels.left_over.gone")
NO_TOP = Route("cpu.no_top", "cpu", "no_such_package.folder.gone")
ROWS = (REFERENCE, PICKY, WILLING, OTHER)


@pytest.fixture(autouse=True)
def kernel_package(tmp_path, monkeypatch):
    """A package of kernels on sys.path, a folder with nothing but a cache in it, and no tables."""
    folder = tmp_path / "made_up_kernels" / "hopper"
    (tmp_path / "made_up_kernels/left_over/__pycache__").mkdir(parents=True)
    folder.mkdir()
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    for name, text in KERNELS.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("QJAX_TUNING_DIR", str(tmp_path / "tables"))
    yield
    for name in [name for name in sys.modules if name.startswith("made_up_kernels")]:
        del sys.modules[name]


def problem(m=1, n=4096, k=4096, scheme=None, **fields):
    return Problem(m, n, k, scheme or W4A16(group_size=128), x_dtype=BF16, out_dtype=BF16, **fields)


def reasons(*args, **kwargs):
    return dict(choose(*args, **kwargs).reasons)


class TableTest(parameterized.TestCase):
    def test_a_route_names_a_backend_and_a_module_in_its_folder(self):
        for route in ROUTES:
            folder = backends.BACKENDS[route.backend].folder
            assert route.name.startswith(route.backend + ".")
            assert route.is_reference or route.module.startswith(folder + ".")

    @parameterized.parameters(*TABLE)
    def test_every_device_can_run_every_problem_by_the_reference(self, device):
        for scheme in (W4A16(), NF4(), W8A8Int8()):
            for features in (frozenset(), frozenset({"input_perm", "offset"})):
                assert choose(problem(0, scheme=scheme, features=features), device).route

    def test_a_problem_is_a_key(self):
        assert hash(problem()) == hash(problem()) and problem() == problem() != problem(2)
        assert choose(problem(), H200, routes=ROWS) is choose(problem(), H200, routes=ROWS)

    def test_a_problem_prints_what_it_is(self):
        text = str(problem(2, bias=True, activation="silu", features=frozenset({"zero_point"})))
        assert text == ("2 x 4096 x 4096 w4a16:group_size=128 bfloat16 -> bfloat16 +silu +bias +zero_point")


class ChooseTest(parameterized.TestCase):
    def test_on_a_cpu_the_reference_runs_and_gpu_kernels_say_why_not(self):
        choice = choose(problem(), CPU, routes=ROWS)
        assert choice.route is REFERENCE
        assert choice.reason.startswith("the only one that can: ")
        assert dict(choice.reasons) == {
            route.name: "it runs on gpu, this is cpu (CPU)" for route in (PICKY, WILLING, OTHER)
        }

    def test_the_fastest_of_those_that_can_runs_and_the_order_of_rows_breaks_ties(self):
        choice = choose(problem(), H200, routes=ROWS)
        assert choice.route is PICKY  # as fast as the others, and before them
        assert choice.reason.startswith("fastest of 4: ") and "x a bf16 weight" in choice.reason
        others = dict(choice.reasons)
        assert others["xla.reference"].startswith("slower: ")
        assert " us estimated vs " in others["xla.reference"]
        assert others["triton.willing"].endswith("later in the table")
        assert choose(problem(), H200, routes=(OTHER, *ROWS[:-1])).route is OTHER

    def test_a_kernel_of_another_architecture_says_which_it_needs(self):
        others = reasons(problem(), A100, routes=ROWS)
        assert others["mosaic.picky"] == ("it needs compute capability 9.0, A100-SXM4-80GB has 8.0")
        later = reasons(problem(), find_device("T4"), routes=ROWS)
        assert later["triton.willing"] == "it needs compute capability 8.0 or later, T4 has 7.5"

    def test_what_a_row_does_not_read_is_named(self):
        route = Route(
            "triton.rows", "triton", "made_up_kernels.hopper.willing", INT4, frozenset({None}),
            features=frozenset({"zero_point"}), m_min=2, m_max=16,
        )  # fmt: skip
        int8 = Route("triton.int8", "triton", route.module, x_formats=frozenset({"int8", "e4m3"}))
        permuted = problem(4, features=frozenset({"zero_point", "input_perm"}))
        known = problem(4, features=frozenset({"zero_point"}))
        assert refusal(route, known, H200) is None
        assert refusal(route, permuted, H200) == "it does not know input_perm, which this tensor has"
        assert refusal(route, problem(4, scheme=NF4()), H200) == "it reads int4, the weight is nf4"
        assert refusal(route, problem(17), H200) == "it is for 2 to 16 rows of x, here are 17"
        assert refusal(route, problem(1), H200) == "it is for 2 to 16 rows of x, here are 1"
        assert refusal(int8, problem(), H200) == ("it takes x as e4m3, int8, w4a16:group_size=128 makes it float")
        assert refusal(int8, problem(scheme=W8A8Int8()), H200) is None

    def test_the_kernel_has_the_last_word(self):
        odd = problem(k=4000)
        assert reasons(odd, H200, routes=ROWS)["mosaic.picky"] == "group 128 does not divide k=4000"
        assert choose(odd, H200, routes=ROWS).route is WILLING

    def test_a_kernel_is_told_plain_values(self):
        told = facts(problem(3, scheme=W8A8Int8(), bias=True), H200)
        assert told["group"] == 4096 and told["bits"] == 8 and told["x_format"] == "int8"
        assert told["smem"] == 227 * 1024 and told["cc"] == 90 and told["sms"] == 132
        for value in told.values():
            assert value is None or isinstance(value, int | str | frozenset), value

    @parameterized.parameters(GONE, LEFT_OVER, NO_TOP)
    def test_a_folder_that_is_gone_leaves_its_rows_inert(self, route):
        assert reasons(problem(), H200, routes=(REFERENCE, route)) == {route.name: ABSENT}

    def test_a_kernel_that_does_not_import_says_so(self):
        others = reasons(problem(), H200, routes=(REFERENCE, BROKEN))
        assert others["triton.broken"].startswith("its module does not import here: ")
        assert "a_part_that_was_removed" in others["triton.broken"]

    def test_a_route_loads_its_module(self):
        assert load(PICKY).unsupported(1, 128, 1, group=96, smem=1) == "group 96 does not divide k=128"


def write_table(*entries, device="H200"):
    tuning.write(
        device,
        [
            tuning.Entry(kernel, "w4a16:group_size=128", 4096, 4096, m, tuning.freeze(config), us)
            for kernel, m, us, config in entries
        ],
    )


class TunedTest(parameterized.TestCase):
    def test_a_measurement_wins_over_the_estimate(self):
        assert choose(problem(), H200, routes=ROWS).route is PICKY
        write_table(("mosaic.picky", 1, 50.0, {}), ("triton.other", 1, 0.5, {"tile_n": 32}))
        choice = choose(problem(), H200, routes=ROWS)
        assert choice.route is OTHER and dict(choice.config) == {"tile_n": 32}
        assert "0.5 us measured" in choice.reason
        assert dict(choice.reasons)["mosaic.picky"] == "slower: 50 us measured vs 0.5 us measured"
        assert dict(choice.reasons)["triton.willing"].startswith("slower: 2")

    def test_an_estimate_takes_the_place_of_a_measurement_only_where_it_is_a_tenth_shorter(self):
        estimated = choose(problem(), H200, routes=(REFERENCE, OTHER)).estimate.seconds
        for of_estimate, expected in ((1.05, WILLING), (1.15, OTHER)):
            write_table(("triton.willing", 1, estimated * of_estimate * 1e6, {}))
            choice = choose(problem(), H200, routes=(REFERENCE, OTHER, WILLING))
            assert choice.route is expected, of_estimate
            slower = dict(choice.reasons)[OTHER.name if expected is WILLING else WILLING.name]
            assert slower.startswith("not surely faster: " if expected is WILLING else "slower: ")

    def test_quantizing_x_outside_of_a_kernel_costs_time_on_a_gpu(self):
        as_it_is = Route("triton.other", "triton", OTHER.module, x_formats=frozenset({None}))
        fused = Route("triton.willing", "triton", WILLING.module, frozenset({"int8"}), frozenset({"int8"}))
        choice = choose(problem(scheme=W8A8Int8()), H200, routes=(REFERENCE, as_it_is, fused))
        assert choice.route is fused
        assert dict(choice.reasons)["triton.other"].startswith("slower: ")

    def test_a_near_bucket_lends_its_config_and_not_its_time(self):
        write_table(("triton.other", 16, 0.001, {"tile_n": 32}))
        near = choose(problem(32), H200, routes=(REFERENCE, OTHER))
        assert dict(near.config) == {"tile_n": 32} and near.estimate.basis == "estimated"
        same = choose(problem(13), H200, routes=(REFERENCE, OTHER))
        assert same.estimate.basis == "measured"

    def test_a_table_of_forward_products_says_nothing_of_transposed_or_stacked_ones(self):
        write_table(("triton.other", 1, 0.001, {"tile_n": 32}))
        turned = choose(problem(transposed=True), H200, routes=(REFERENCE, OTHER))
        assert turned.config == () and turned.estimate.basis == "estimated"
        stacked = choose(problem(batch=8), H200, routes=(REFERENCE, OTHER))
        assert stacked.config != () and stacked.estimate.basis == "estimated"

    def test_a_table_is_for_one_device(self):
        write_table(("triton.other", 1, 0.001, {}), device="A100-SXM4-80GB")
        assert choose(problem(), H200, routes=ROWS).route is PICKY
        assert choose(problem(), A100, routes=ROWS).route is OTHER


class BackendTest(parameterized.TestCase):
    def test_the_users_word_wins_over_time(self):
        choice = choose(problem(), H200, "xla", routes=ROWS)
        assert choice.route is REFERENCE and choice.reason.startswith("asked for: ")
        assert dict(choice.reasons)["mosaic.picky"] == "backend='xla' was asked for"

    def test_the_fastest_kernel_of_the_backend_runs(self):
        write_table(("triton.other", 1, 0.5, {}))
        choice = choose(problem(), H200, "triton", routes=ROWS)
        assert choice.route is OTHER
        assert dict(choice.reasons)["triton.willing"].startswith("slower: ")

    def test_a_backend_that_cannot_raises_with_its_reason_and_what_can(self):
        with pytest.raises(
            BackendError,
            match=r"backend 'mosaic' cannot run 1 x 4000 x 4096 .* on H200: mosaic\.picky: group 128 "
            r"does not divide k=4000; possible here: xla, triton",
        ):
            choose(problem(k=4000), H200, "mosaic", routes=ROWS)

    def test_a_gpu_backend_is_impossible_on_a_cpu(self):
        with pytest.raises(BackendError, match=r"on CPU: .*it runs on gpu.*possible here: xla$"):
            choose(problem(), CPU, "triton", routes=ROWS)

    def test_a_backend_without_kernels_is_impossible(self):
        with pytest.raises(BackendError, match="'cublaslt' cannot.*it has no kernels"):
            choose(problem(), H200, "cublaslt", routes=ROWS)

    def test_an_absent_backend_is_impossible(self):
        with pytest.raises(BackendError, match=rf"cublaslt\.gone: {ABSENT}"):
            choose(problem(), H200, "cublaslt", routes=(REFERENCE, GONE))

    def test_an_unknown_backend_raises_naming_what_is_possible_here(self):
        with pytest.raises(BackendError, match="unknown backend 'cutlass'; possible on CPU: auto, xla;"):
            choose(problem(), CPU, "cutlass", routes=ROWS)
        with pytest.raises(BackendError, match="on H200: auto, xla, mosaic, triton;.*marlin"):
            choose(problem(), H200, "cutlass", routes=(*ROWS, GONE))

    def test_possible_backends_are_present_and_fit_the_device(self):
        assert possible(CPU, (*ROWS, LEFT_OVER)) == ("xla",)
        assert possible(A100, ROWS) == ("xla", "triton")
        assert possible(H200, (*ROWS, GONE)) == ("xla", "mosaic", "triton")

    @parameterized.parameters("marlin", "exllama", "exllamav2", "gemm", "gemv", "gemv_fast", "Marlin")
    def test_kernels_of_the_torch_world_mean_whichever_is_fastest_here(self, name):
        choice = choose(problem(), H200, name, routes=ROWS)
        assert choice.route is PICKY and f"backend {name.lower()!r} names" in choice.note

    def test_torch_means_the_frameworks_own_operations(self):
        choice = choose(problem(), H200, "torch", routes=ROWS)
        assert choice.route is REFERENCE and "here, 'xla'" in choice.note

    def test_our_own_names_need_no_note(self):
        assert all(choose(problem(), H200, n, routes=ROWS).note == "" for n in ("auto", "triton"))


class UseTest(chex.TestCase):
    def test_a_backend_holds_while_it_is_open_and_nests(self):
        def chosen():
            return choose(problem(), H200, routes=ROWS).route

        with use(backend="triton"):
            assert chosen() is WILLING
            with use(backend="xla"):
                assert chosen() is REFERENCE
            with use(device="A100"):
                assert chosen() is WILLING
            with use(backend="auto"):
                assert chosen() is PICKY
            assert choose(problem(), H200, "mosaic", routes=ROWS).route is PICKY
        assert chosen() is PICKY

    def test_a_device_that_is_not_at_hand_can_be_asked_about(self):
        with use(device="h200"):
            assert choose(problem(), routes=ROWS).route is PICKY
        with use(device=A100):
            assert choose(problem(), routes=ROWS).route is WILLING
        assert choose(problem(), routes=ROWS).route is REFERENCE

    def test_it_is_undone_by_an_error(self):
        with pytest.raises(RuntimeError), use(backend="xla", device="H200"):
            raise RuntimeError
        assert choose(problem(), H200, routes=ROWS).route is PICKY

    def test_mistakes_are_found_on_entering(self):
        with pytest.raises(BackendError, match="unknown backend 'fast'"), use(backend="fast"):
            pass
        with pytest.raises(QJaxError, match="unknown device 'H9'"), use(device="H9"):
            pass

    def test_it_is_seen_by_its_own_thread_only(self):
        seen = []
        with use(backend="triton"):
            thread = threading.Thread(target=lambda: seen.append(choose(problem(), H200, routes=ROWS).route))
            thread.start()
            thread.join()
        assert seen == [PICKY]

    def test_a_jitted_function_is_traced_again_for_it(self):
        traced = []

        @jax.jit
        def f(x):
            traced.append(choose(problem(), H200, routes=ROWS).route)
            return x + 1

        f(1.0)
        with use(backend="xla"):
            f(1.0)
            f(2.0)
        f(1.0)
        assert traced == [PICKY, REFERENCE]

    def test_it_works_inside_a_jitted_function(self):
        traced = []

        @jax.jit
        def inner(x):
            traced.append(choose(problem(), H200, routes=ROWS).route)
            return x + 1

        @jax.jit
        def outer(x):
            with use(backend="triton"):
                return inner(x)

        inner(1.0)
        outer(1.0)
        assert traced == [PICKY, WILLING]
