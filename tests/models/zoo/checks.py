"""One family loaded, pruned, saved and loaded again, judged by multiplications that were watched on whole forwards."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file

import sparsekern
from sparsekern.runtime.packable import find_packables
from sparsekern.runtime.packing import smallest

from .family import Family, Sample
from .watching import Watch

PART = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)")
DBRX = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}
EQUAL = 1 - 1e-4  # scores that differ by less than the precision of float32 statistics may go either way


def check_family(family: Family, folder: Path) -> dict[str, object]:
    """Check all of a family, and return its row of the table in the documentation."""
    dense, samples = family.model(), family.samples()
    dense.save_pretrained(folder / "dense")
    model = sparsekern.load(folder / "dense", device="cpu")
    assert_same_weights(model, dense)
    row: dict[str, object] = {"type": dense.config.model_type, "class": family.architecture}
    options = {"calibration": family.calibration(), "out": folder / "pruned", "progress": False, **family.options}
    if family.refused:
        message = ""
        try:
            sparsekern.prune(model, "wanda", "2:4", **options)
        except ValueError as error:
            message = str(error)
        assert family.refused in message
        assert_same_weights(model, dense)
        return row | {"refused": family.refused}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparsekern.SparsekernWarning)
        report = sparsekern.prune(model, "wanda", "2:4", **options)
    zeros = {layer.name: layer.zeros for layer in report.layers}
    check_decisions(family, dense, model, set(zeros), samples)
    check_folders(folder / "dense", folder / "pruned", sum(zeros.values()))
    check_reloaded(sparsekern.load(folder / "pruned", device="cpu"), model, samples[0])
    check_reloaded(getattr(tf, family.architecture).from_pretrained(folder / "pruned").eval(), model, samples[0])
    unpacked = check_packed(family, model, folder / "packed", set(zeros), samples[0])
    found = {"blocks": list(family.stacks), "pruned": kinds_of(family, zeros), "dense": family.dense, "unpacked": unpacked}
    return row | found


def check_decisions(family: Family, dense: tf.PreTrainedModel, pruned: tf.PreTrainedModel, names: set[str], samples: list[Sample]):
    """Raise unless, block by block, the weights that are left have the highest scores, given the pruned blocks before.

    Each decision is judged and then taken over, so that one that could go either way does not change what follows. All that the
    blocks multiply by is either pruned or said to stay dense, and nothing else of the model has changed.
    """
    oracle, result = copy.deepcopy(dense), dict(pruned.named_parameters())
    if oracle._can_set_experts_implementation():
        oracle.set_experts_implementation("eager")  # which multiplies by one expert at a time
    changed, reasons = set(), set()
    for prefix in (f"{stack}.{index}." for stack in family.stacks for index in range(len(oracle.get_submodule(stack)))):
        with torch.no_grad(), Watch(oracle, prefix) as watch:
            for sample in samples:
                oracle(**sample)
        parameters = {name: value for name, value in oracle.named_parameters() if name.startswith(prefix)}
        mine = {name for name in names if name.startswith(prefix)}
        for name in mine:
            parameter, expert, part = place(name, parameters)
            experts = 1 + max((number for other, number in watch.seen if other == parameter), default=0)
            transposed = any(found.transposed for (other, _), found in watch.seen.items() if other == parameter)
            before, after = (
                matrix_of(values[parameter].data, expert, experts, transposed, parameter, part, family.interleaved)
                for values in (parameters, result)
            )
            scores = before.double().abs()
            if (seen := watch.seen.get((parameter, expert))) is not None:  # an expert without a token is pruned by magnitude
                scores = scores * seen.squares.sqrt()
            check_matrix(name, before, after, scores)
            changed.add(parameter)
        for name in {name for name, _ in watch.seen} | watch.read:
            if name not in changed:
                found = [end for end in family.dense if name.removesuffix(".weight").endswith(f".{end}")]
                assert found, f"{name} is multiplied by, and neither pruned nor said to stay dense"
                reasons.update(found)
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(result[name])
        names = names - mine
    assert not names, f"pruned, but in none of {family.stacks}: {sorted(names)}"
    assert reasons == set(family.dense), f"not found dense: {set(family.dense) - reasons}"
    for name, value in dense.state_dict().items():
        assert name in changed or torch.equal(pruned.state_dict()[name], value), f"{name} has changed"


def place(name: str, parameters: dict[str, torch.nn.Parameter]) -> tuple[str, int, str]:
    """The parameter that holds a linear, the number of its expert, and which of its matrices it is."""
    if f"{name}.weight" in parameters:
        return f"{name}.weight", 0, ""
    found = PART.fullmatch(name)
    assert found, f"{name} is not a linear"
    base, expert, part = found.groups()
    stored = (f"{base}.{part}", f"{base}.gate_up_proj", f"{base}.mlp.{DBRX[part]}")
    return next(each for each in stored if each in parameters), int(expert), part


def matrix_of(
    stored: torch.Tensor, expert: int, experts: int, transposed: bool, parameter: str, part: str, interleaved: bool
) -> torch.Tensor:
    """`[out_features, in_features]`, a view of a parameter."""
    matrix = (stored if stored.dim() == 3 else stored.view(experts, -1, stored.shape[-1]))[expert]
    matrix = matrix.T if transposed else matrix
    if not parameter.endswith("gate_up_proj") or not part:
        return matrix
    halves = (matrix[0::2], matrix[1::2]) if interleaved else matrix.chunk(2)
    return halves[0 if part == "gate_proj" else 1]


def check_matrix(name: str, before: torch.Tensor, after: torch.Tensor, scores: torch.Tensor) -> None:
    """Raise unless two of every four weights are left, as they were, and none of them has a lower score than one that went."""
    kept = after != 0
    assert torch.equal(after, before * kept), f"{name}: a weight that is left has changed"
    groups = kept.unflatten(1, (-1, 4))
    assert (groups.sum(-1) == 2).all(), f"{name}: not 2:4"
    scores = scores.unflatten(1, (-1, 4))
    lowest = scores.masked_fill(~groups, torch.inf).amin(-1)
    highest = scores.masked_fill(groups, 0).amax(-1)
    assert (lowest >= highest * EQUAL).all(), f"{name}: a weight was dropped for one of lower score"


def check_folders(dense: Path, pruned: Path, zeros: int) -> None:
    """Raise unless every tensor of the source is in the result, unchanged except for the zeros that were reported."""
    before, after = tensors(dense), tensors(pruned)
    shapes = [{name: (value.dtype, value.shape) for name, value in values.items()} for values in (before, after)]
    assert shapes[0] == shapes[1]
    found = 0
    for name, value in before.items():
        now = after[name]
        assert torch.equal(now, value * (now != 0)), f"{name}: a weight that is left was saved otherwise"
        found += int((now == 0).sum() - (value == 0).sum())
    assert found == zeros


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def check_reloaded(model: tf.PreTrainedModel, expected: tf.PreTrainedModel, sample: Sample) -> None:
    assert_same_weights(model, expected)
    with torch.no_grad():
        found, wanted = model(**sample), expected(**sample)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all(), name
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def check_packed(family: Family, model: tf.PreTrainedModel, folder: Path, names: set[str], sample: Sample):
    """Raise unless the packed model computes the same, unpacks to the same, and holds all linears packed but those that are named.

    Returns the names that are not packed, and why.
    """
    packed = sparsekern.load(sparsekern.save(model, folder, "packed"), device="cpu")
    with torch.no_grad():
        found, wanted = packed(**sample), model(**sample)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    dense, still = dict(model.named_parameters()), {name for name, _ in packed.named_parameters()}
    left = {name for name in names if place(name, dense)[0] in still}
    experts = {place(name, dense)[0] for name in left if place(name, dense)[2]}
    packables = find_packables(model)
    why = {packables[name].why_not(Counter()) for name in experts if smallest(packables[name].dense) is not None}
    assert None not in why, f"some of {experts} would get smaller"
    reasons = set()
    for name in (name for name in left if not place(name, dense)[2]):
        ends = [end for end in family.unpacked if name.endswith(f".{end}")]
        assert ends, f"{name} is not packed, and nobody says why"
        reasons.update(ends)
    assert reasons == set(family.unpacked), f"packed all the same: {set(family.unpacked) - reasons}"
    assert_same_weights(sparsekern.unpack(packed), model)
    return {**family.unpacked, **dict.fromkeys(["experts"] if why else [], "; ".join(sorted(filter(None, why))))}


def assert_same_weights(model: tf.PreTrainedModel, expected: tf.PreTrainedModel) -> None:
    assert type(model).__name__ == type(expected).__name__
    found, wanted = model.state_dict(), expected.state_dict()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def kinds_of(family: Family, names: dict[str, int]) -> list[str]:
    """The names of linears in their blocks, with `*` for numbers, in the order of the report."""
    within = [
        name.removeprefix(f"{stack}.").partition(".")[2] for name in names for stack in family.stacks if name.startswith(stack)
    ]
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in within))
