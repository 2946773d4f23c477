"""Problem x Device -> Route, config: at trace time, from tables. Alone looks for kernel folders.

Every route is either refused with a reason or estimated; a measurement wins over an estimate; the
fastest runs, and one that is only estimated takes the place of a measured one where that leaves no
doubt. Where the user names a backend no other is considered: it runs, or that is an error.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from absl import logging

from qjax import devices
from qjax.devices import Device
from qjax.dispatch import backends, roofline, tuning
from qjax.dispatch.backends import Selection
from qjax.dispatch.problem import Problem
from qjax.dispatch.roofline import Estimate
from qjax.dispatch.routes import AS_IT_IS, ROUTES, Quantizer, Route
from qjax.errors import BackendError

ABSENT = "backend absent"
# In seven of eight entries of the H200's table, what was measured is no more than this many times the estimate.
DOUBT = 1.1


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
      route: the kernel.
      config: its tuned config; empty where there is none and the kernel's own table decides.
      estimate: its time.
      reason: why it was taken.
      reasons: `(route, reason)` of every route that was not.
      note: what a name given for the backend was taken to mean.
    """

    route: Route
    config: tuning.Config
    estimate: Estimate
    reason: str
    reasons: tuple[tuple[str, str], ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Candidate:
    route: Route
    config: tuning.Config
    estimate: Estimate


@contextlib.contextmanager
def use(backend: str | None = None, device: str | Device | None = None) -> Iterator[None]:
    """Chooses kernels of one backend, or for another device, in this thread, while it is open.

    Works around a call and inside a traced function: both are part of jit's cache key, so that a
    jitted function is traced again. A device that is not at hand is for seeing what would be chosen
    there (`qjax.explain`) and for lowering ahead of time; its kernels do not run here. Arguments
    left out keep what an outer `use` said; `backend="auto"` undoes it.

    Raises:
      BackendError: an unknown backend.
      QJaxError: an unknown device.
    """
    with contextlib.ExitStack() as stack:
        if device is not None:
            row = devices.find_device(device) if isinstance(device, str) else device
            stack.enter_context(devices.override(row))
        if backend is not None:
            _select(backend, devices.current(), ROUTES)
            stack.enter_context(backends.override(backend))
        yield


def choose(
    problem: Problem,
    device: Device | None = None,
    backend: str | None = None,
    routes: tuple[Route, ...] = ROUTES,
) -> Choice:
    """The kernel that runs `problem`, with the reasons of all others.

    Args:
      problem: the product.
      device: where it runs; `devices.current()` by default.
      backend: a name that `backends.selection` knows; what `use` said by default, else any. Of a kernel's name a
        product by the transpose, a gradient, takes the family alone.
      routes: the kernels there are.

    Raises:
      BackendError: for an unknown backend, or one that cannot run the problem on the device. The
        message has its reason and names those that can.
    """
    device = devices.current() if device is None else device
    name = backend or backends.override.value or "auto"
    return _choose(problem, device, name, routes, tuning.read(device.name))


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, device: Device, name: str, routes: tuple[Route, ...], table: tuning.Table) -> Choice:
    selection = _select(name, device, routes)
    if problem.transposed:
        selection = dataclasses.replace(selection, route=None, config=None)
    refused = {route.name: refusal(route, problem, device) for route in routes}
    able = [_candidate(r, problem, device, table) for r in routes if refused[r.name] is None]
    wanted = [_asked(c, selection, problem, device) for c in able if _is_asked(selection, c.route)]
    chosen = {c.route.name for c in wanted}
    if not wanted:
        raise BackendError(_cannot(name, selection, problem, device, routes, refused))
    best = _fastest(wanted)
    for other in able:
        if other.route.name not in chosen:
            refused[other.route.name] = f"backend={name!r} was asked for"
        elif other.route != best.route:
            refused[other.route.name] = _slower(other, best)
    reasons = tuple((route, reason) for route, reason in refused.items() if reason is not None)
    reason = _why(best, wanted, selection, problem, device)
    return Choice(best.route, best.config, best.estimate, reason, reasons, selection.note)


def _fastest(wanted: list[_Candidate]) -> _Candidate:
    """The shortest time, the first of equals; beside a measured one, that of an estimate counts `DOUBT` times."""
    measured = any(c.estimate.basis == "measured" for c in wanted)

    def seconds(candidate: _Candidate) -> float:
        doubt = DOUBT if measured and candidate.estimate.basis == "estimated" else 1.0
        return candidate.estimate.seconds * doubt

    return min(wanted, key=seconds)


def _is_asked(selection: Selection, route: Route) -> bool:
    return selection.backend in (None, route.backend) and selection.route in (None, route.name)


def _asked(candidate: _Candidate, selection: Selection, problem: Problem, device: Device) -> _Candidate:
    """The candidate in the configuration that was asked for.

    Raises:
      BackendError: for a configuration that the kernel does not take.
    """
    if selection.config is None:
        return candidate
    route, given = candidate.route, dict(selection.config)
    kernel = None if route.is_reference else load(route)
    listed = kernel.configs(problem.m, problem.k, problem.n, **facts(problem, device)) if kernel else []
    keys = list(listed[0]) if listed else []
    if given.keys() != set(keys):
        takes = f"it takes {', '.join(keys)}" if keys else f"it has none for {problem.shape}"
        raise BackendError(f"{route.name} cannot have the configuration {given}: {takes}")
    return dataclasses.replace(_candidate(route, problem, device, tuning.Table()), config=selection.config)


def _candidate(route: Route, problem: Problem, device: Device, table: tuning.Table) -> _Candidate:
    seen = seen_by(route, problem)
    estimate = roofline.estimate(seen, device, roofline.efficiency(route.name, seen, device))
    if seen is not problem and device.platform == "gpu":
        estimate = dataclasses.replace(estimate, seconds=estimate.seconds + roofline.OUTSIDE)
    scheme = str(problem.scheme)
    entry = table.nearest(route.name, scheme, problem.n, problem.k, problem.m)
    if entry is None or problem.transposed:  # tables are of forward products
        return _Candidate(route, (), estimate)
    if entry.m == tuning.bucket(problem.m) and problem.batch == 1:
        seconds = entry.microseconds * 1e-6
        estimate = dataclasses.replace(estimate, seconds=seconds, basis="measured")
    return _Candidate(route, entry.config, estimate)


def refusal(route: Route, problem: Problem, device: Device) -> str | None:
    """Why the route cannot run the problem on the device, in words for a user; None if it can.

    A missing folder comes first, then the row, then the kernel's own `unsupported`.
    """
    if not is_present(route):
        return ABSENT
    problem = seen_by(route, problem)
    reason = _mismatch(route, problem, device)
    if reason is not None or route.is_reference:  # it takes all
        return reason
    try:
        module = load(route)
    except ImportError as error:  # JAX drops parts of itself, and a kernel folder goes with them
        logging.log_first_n(logging.WARNING, "%s does not import: %s", 1, route.module, error)
        return f"its module does not import here: {error}"
    return module.unsupported(problem.m, problem.k, problem.n, **facts(problem, device))


def seen_by(route: Route, problem: Problem) -> Problem:
    """The problem, x as its codes in a float where it is quantized and the route takes x only as it is."""
    if problem.x_format is None or route.x_formats != AS_IT_IS or problem.x_granularity == "block":
        return problem
    return problem.with_float_x()


def _mismatch(route: Route, problem: Problem, device: Device) -> str | None:
    """Why the row does not fit, from the most general reason to the most particular."""
    scheme = problem.scheme
    x_format = problem.x_format
    needed = f"{route.cc_min / 10:.1f}"
    if route.cc_max != route.cc_min:
        needed += f" to {route.cc_max / 10:.1f}" if route.cc_max else " or later"
    if route.platforms is not None and device.platform not in route.platforms:
        return f"it runs on {_list(route.platforms)}, this is {device.platform} ({device.name})"
    if device.cc < route.cc_min or (route.cc_max is not None and device.cc > route.cc_max):
        return f"it needs compute capability {needed}, {device.name} has {device.cc / 10:.1f}"
    if route.formats is not None and scheme.weight not in route.formats:
        return f"it reads {_list(route.formats)}, the weight is {scheme.weight}"
    if route.x_formats is not None and x_format not in route.x_formats:
        return f"it takes x as {_list(route.x_formats)}, {scheme} makes it {_x_name(x_format)}"
    strange = problem.features - (problem.features if route.features is None else route.features)
    if strange:
        return f"it does not know {_list(strange)}, which this tensor has"
    if problem.m < route.m_min or (route.m_max is not None and problem.m > route.m_max):
        upper = f" to {route.m_max}" if route.m_max is not None else " or more"
        return f"it is for {route.m_min}{upper} rows of x, here are {problem.m}"
    return None


def facts(problem: Problem, device: Device) -> dict[str, Any]:
    """What a kernel's `unsupported` and `configs` are told by keyword: plain values only.

    A kernel names those it needs and takes the rest as `**_`. `group` is the elements along k that
    share a scale, `x_format` what x is quantized to, `smem` the shared memory one block can have.
    """
    scheme = problem.scheme
    block_n, group = problem.block
    return {
        "weight": scheme.weight,
        "bits": scheme.bits,
        "group": group,
        "block_n": block_n,
        "symmetric": scheme.symmetric,
        "x_format": problem.x_format,
        "x_granularity": problem.x_granularity,
        "x_dtype": problem.x_dtype.name,
        "out_dtype": problem.out_dtype.name,
        "scale_dtype": problem.scale_dtype.name,
        "bias": problem.bias,
        "activation": problem.activation,
        "residual": problem.residual,
        "batch": problem.batch,
        "transposed": problem.transposed,
        "features": problem.features,
        "cc": device.cc,
        "smem": device.shared.smem_block,
        "sms": device.sms,
    }


def _told(route: Route, name: str) -> str | None:
    """What a route's module says of this machine by one of the functions that it need not have."""
    if route.is_reference:
        return None
    tell = getattr(load(route), name, None)
    return None if tell is None else tell()


def load(kernel: Route | Quantizer) -> ModuleType:
    """The module of a route, whose `matmul` runs it, or of a quantizer."""
    return importlib.import_module(kernel.module)


def load_if_present(kernel: Route | Quantizer) -> ModuleType | None:
    """The same, or None where its folder is lost or does not import."""
    if not is_present(kernel):
        return None
    try:
        return load(kernel)
    except ImportError as error:  # JAX drops parts of itself, and a kernel folder goes with them
        logging.log_first_n(logging.WARNING, "%s does not import: %s", 1, kernel.module, error)
        return None


def possible(device: Device, routes: tuple[Route, ...] = ROUTES) -> tuple[str, ...]:
    """The backends that have a kernel for the device, and of which nothing is missing."""
    fits = (
        route.backend
        for route in routes
        if (route.platforms is None or device.platform in route.platforms)
        and route.cc_min <= device.cc <= (device.cc if route.cc_max is None else route.cc_max)
        and lacking(route) is None
    )
    return tuple(dict.fromkeys(fits))


def lacking(route: Route) -> str | None:
    """What a kernel lacks on this machine, whatever the product; None if nothing."""
    if not is_present(route):
        return ABSENT
    try:
        return _told(route, "missing")
    except ImportError as error:
        return f"its module does not import here: {error}"


def is_present(kernel: Route | Quantizer) -> bool:
    """Whether the module's folder is there, as a package and not as a left-over `__pycache__`."""
    parts = kernel.module.split(".")[:-1]
    folders = (".".join(parts[: i + 1]) for i in range(len(parts)))
    # From the outermost inwards: to look for a folder inside a missing one raises.
    return all(_is_package(folder) for folder in folders)


def _is_package(folder: str) -> bool:
    spec = importlib.util.find_spec(folder)
    return spec is not None and spec.loader is not None and spec.origin is not None


def _select(name: str, device: Device, routes: tuple[Route, ...]) -> Selection:
    selection = backends.selection(name)
    if selection is None or selection.route not in (None, *(route.name for route in routes)):
        raise BackendError(
            f"unknown backend {name!r}; possible on {device.name}: auto, "
            f"{', '.join(possible(device, routes))}; of Hugging Face configs, "
            f"{', '.join(backends.HUGGING_FACE)} are understood; kernels are "
            f"{', '.join(route.name for route in routes)}, with or without :key=number,..."
        )
    return selection


def _cannot(
    name: str,
    selection: Selection,
    problem: Problem,
    device: Device,
    routes: tuple[Route, ...],
    refused: dict[str, str | None],
) -> str:
    own = [f"{r.name}: {refused[r.name]}" for r in routes if _is_asked(selection, r)]
    able = dict.fromkeys(r.backend for r in routes if refused[r.name] is None)
    return (
        f"backend {name!r} cannot run {problem} on {device.name}: "
        f"{'; '.join(own) or 'it has no kernels'}; possible here: {', '.join(able) or 'none'}"
    )


def _why(
    best: _Candidate,
    wanted: list[_Candidate],
    selection: Selection,
    problem: Problem,
    device: Device,
) -> str:
    if selection.backend is not None:
        settings = ", ".join(f"{key}={value}" for key, value in selection.config or ())
        word = "asked for" + (f" in {settings}" if settings else "")
    else:
        word = f"fastest of {len(wanted)}" if len(wanted) > 1 else "the only one that can"
    text = f"{word}: {best.estimate}, {best.estimate.bound}-bound"
    if device.takes("bfloat16"):
        speedup = roofline.speedup_over_bf16(best.estimate, problem, device)
        text += f", {speedup:.2g}x a bf16 weight"
    variant = _told(best.route, "variant")
    return text if variant is None else f"{text}, {variant}"


def _slower(other: _Candidate, best: _Candidate) -> str:
    if other.estimate.seconds == best.estimate.seconds:
        return f"as fast ({other.estimate}), but later in the table"
    if other.estimate.seconds < best.estimate.seconds:
        return f"not surely faster: {other.estimate} vs {best.estimate}"
    return f"slower: {other.estimate} vs {best.estimate}"


def _x_name(format: str | None) -> str:
    return format or "float"


def _list(names: frozenset[str] | frozenset[str | None]) -> str:
    return ", ".join(sorted(_x_name(name) for name in names))
