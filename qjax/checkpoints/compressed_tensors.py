"""compressed-tensors folders (llm-compressor, vLLM): which module is in which format, and how x is quantized.

`config_groups` map targets (a module's name, `re:` and a pattern, a class) to a format and its arguments; the most
specific target wins, `ignore` wins over all. What the formats' tensors mean is in `compressed_tensors_weights`.
Source: vllm-project/compressed-tensors `quantization/{quant_args,quant_config}.py`, `utils/match.py`.
"""

from dataclasses import dataclass

import numpy as np

from qjax.checkpoints.activations import as_stored
from qjax.checkpoints.compressed_tensors_weights import CODE_TENSORS, FORMATS_OF_TYPE, WEIGHTS, Arguments
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings, Source, matches
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor
from qjax.schemes import Activation

MIXED = "mixed-precision"
DENSE = "dense"
PATTERN = "re:"
CLASSES = {"embed_tokens": "Embedding"}  # every other module that is asked for is a Linear

# (type, strategy, dynamic) of 8-bit `input_activations` -> how x is quantized.
ACTIVATIONS = {
    ("int", "token", True): Activation("int8", "token"),
    ("int", "tensor", True): Activation("int8", "tensor"),
    ("int", "tensor", False): Activation("int8", "tensor", "static"),
    ("float", "token", True): Activation("e4m3", "token"),
    ("float", "tensor", True): Activation("e4m3", "tensor"),
    ("float", "tensor", False): Activation("e4m3", "tensor", "static"),
    ("float", "group", True): Activation("e4m3", "block"),
}
ACTIVATION_BLOCK = 128

OUTPUT_ACTIVATIONS = "output_activations are left as they are: QJAX quantizes what goes into a product alone"

# Scales of what a projection gives, by which older writers mean those of a KV cache.
OUTPUTS = ("output_scale", "output_zero_point")


@dataclass(frozen=True)
class Group:
    """One of `config_groups`."""

    name: str
    targets: tuple[str, ...]
    format: str | None
    weights: Arguments | None
    activation: Activation | None
    notes: tuple[str, ...]


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of a compressed-tensors folder.

    Raises:
      CheckpointError: settings that are malformed or of a format that is not read here; from the reader itself, a
        tensor that is missing or disagrees with them.
    """
    settings.one_of("quantization_status", ("compressed",), "compressed")
    _refuse_transforms(settings)
    form = settings.get("format", MIXED)
    if form not in (*WEIGHTS, MIXED, DENSE):
        raise settings.error("format", f"one of {', '.join((*WEIGHTS, MIXED, DENSE))}: others are not read")
    groups = _groups(settings, form)
    ignore = settings.strings("ignore")
    notes = [f"{group.name}: {note}" for group in groups for note in group.notes]

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        tensors = ModuleTensors(files, prefix)
        group = None if _is_target(ignore, prefix, settings.where) else _group_of(groups, prefix, settings.where)
        if group is None or group.weights is None:
            _check_dense(tensors, settings)
            return None
        form = group.format or _infer_format(tensors, group.weights)
        return _weight(tensors, group, form, settings), tuple(tensors.names)

    return Source(read, (*CODE_TENSORS, "weight_scale"), notes=tuple(notes))


def _refuse_transforms(settings: Settings) -> None:
    transforms = settings.part("transform_config")
    if transforms is not None and transforms.values.get("config_groups", transforms.values):
        raise settings.error("transform_config", "nothing: rotated weights are not read")
    sparsity = settings.part("sparsity_config")
    if sparsity is not None and sparsity.get("format", DENSE) != DENSE:
        raise settings.error("sparsity_config", "nothing, or the format dense: sparse weights are not read")


def _groups(settings: Settings, form: str) -> tuple[Group, ...]:
    table = settings.part("config_groups")
    if table is None:
        raise settings.error("config_groups", "an object")
    found = []
    for name in table.values:
        group = table.part(name)
        assert group is not None, "nulls are left out"
        weights = group.part("weights")
        own = group.get("format", None if form == MIXED else form)
        if own not in (None, DENSE, *WEIGHTS):
            raise group.error("format", f"one of {', '.join(WEIGHTS)}: others are not read")
        arguments = None if weights is None or own == DENSE else Arguments.of(weights)
        activation, note = _activation(group)
        outputs = None if group.part("output_activations") is None else OUTPUT_ACTIVATIONS
        notes = tuple(said for said in (note, outputs) if said is not None)
        found.append(Group(group.where, group.strings("targets"), own, arguments, activation, notes))
    return tuple(found)


def _activation(group: Settings) -> tuple[Activation | None, str | None]:
    """How x is quantized, or a note that it is left alone although the group asks for it."""
    given = group.part("input_activations")
    if given is None:
        return None, None
    strategy = given.get("strategy", "tensor")
    key = (given.get("type", "int"), strategy, given.get("dynamic", False))
    blocks = strategy != "group" or given.get("group_size") == ACTIVATION_BLOCK
    if given.get("num_bits") == 8 and given.flag("symmetric", True) and blocks and None not in key:
        found = next((value for known, value in ACTIVATIONS.items() if known == key), None)
        if found is not None:
            return found, None
    asked = ", ".join(f"{name}={given.get(name)}" for name in ("num_bits", "type", "strategy", "dynamic", "symmetric"))
    return None, f"input_activations ({asked}) are left as they are: QJAX has no such scheme"


def _is_target(targets: tuple[str, ...], prefix: str, where: str) -> bool:
    return _priority(targets, prefix, where) is not None


def _priority(targets: tuple[str, ...], prefix: str, where: str) -> int | None:
    """0 for the name itself, 1 for a pattern, 2 for the class; None where no target is this module."""
    kind = CLASSES.get(prefix.rpartition(".")[2], "Linear")
    found: list[int] = []
    for target in targets:
        if target == prefix:
            found.append(0)
        elif target.startswith(PATTERN):
            found += [1] if matches(target.removeprefix(PATTERN), prefix, where) else []
        elif target == kind:
            found.append(2)
    return min(found, default=None)


def _group_of(groups: tuple[Group, ...], prefix: str, where: str) -> Group | None:
    ranked = [(rank, group) for group in groups if (rank := _priority(group.targets, prefix, where)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _check_dense(tensors: ModuleTensors, settings: Settings) -> None:
    for suffix in (*CODE_TENSORS, "weight_scale"):
        if suffix in tensors:
            raise CheckpointError(
                f"{tensors.where(suffix)}: {settings.where} leaves {tensors.prefix} out (it is ignored, or no group's "
                "target), and the file has it quantized"
            )


def _infer_format(tensors: ModuleTensors, arguments: Arguments) -> str:
    """The format of a group that does not state it: the one of its type whose tensors the module has."""
    for form in FORMATS_OF_TYPE[arguments.kind]:
        if WEIGHTS[form].codes in tensors:
            return form
    raise CheckpointError(f"{tensors.where('weight_packed')}: missing, and so is weight; the config has it quantized")


def _weight(tensors: ModuleTensors, group: Group, form: str, settings: Settings) -> QTensor:
    assert group.weights is not None, "dense groups were left to the dense reader"
    row = WEIGHTS[form]
    if row.codes not in tensors:
        raise CheckpointError(
            f"{tensors.where(row.codes)}: missing; {group.name} has {tensors.prefix} in the format {form}"
        )
    group.weights.check(form)
    w = row.read(tensors, group.weights, str(settings.get("version", "")))
    for suffix in (*OUTPUTS, "input_zero_point", "input_global_scale"):
        if suffix in tensors:
            tensors.take(suffix, (*SCALES, "int8"))
    static = _input_scale(tensors)
    if group.activation is None:
        return w
    if group.activation.mode == "dynamic":
        static = None
    elif static is None:
        raise CheckpointError(f"{tensors.where('input_scale')}: missing; {group.name} has static input_activations")
    found = as_stored(w, group.activation, static)
    return w if found is None else found


def _input_scale(tensors: ModuleTensors) -> np.ndarray | None:
    if "input_scale" not in tensors:
        return None
    return tensors.take_one("input_scale", SCALES).reshape(()).astype(np.float32)
