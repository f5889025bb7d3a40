"""The function `moefy`: divide the neurons of a dense decoder among experts, by what is active together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..backends.libraries import check_isa
from ..data import CalibrationText, as_calibration, is_source
from ..models import find_blocks
from ..models.limits import check_count, positions, vocabulary
from ..models.linears import Linear, find_linears
from ..models.streaming import refuse_streamed
from ..pruning.batches import Batch, Calibration, as_batches
from ..pruning.blockwise.activations import Activations
from ..pruning.blockwise.observation import course_of
from ..pruning.modes import plain_modes
from ..pruning.session import check_module, check_seed, prepared
from ..runtime import is_packed
from .clusters import balanced_clusters
from .mixture import PARTS, TINY, Split, check_decoder, make_mixture

SAMPLES = 32
COMPARED_TOKENS = 4096  # enough tokens to tell which neurons are active together
ACTIVE_SHARE = 0.1  # share of a token's neurons that count as active in the comparison
ROWS = 2048  # tokens whose neurons are held at once
RIDGE = 0.01
SAME = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative difference of the logits


def moefy(
    model: nn.Module,
    experts: int = 16,
    top_k: int = 4,
    *,
    calibration: Calibration,
    shared: int = 1,
    tokenizer: Any = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Return a mixture of experts with the weights of a dense decoder. Each feed-forward network is split into experts of equal size.

    Neurons that are active for the same tokens come into one expert. A neuron's activation is the length of what it adds to the
    output, `|act(gate x) * up x|` times the norm of its column of the down projection. It counts as active where it is among the
    token's top tenth. The experts are clusters of equal size by the cosine of these indicators.

    The router of a layer predicts the sums of activations of each expert by ridge regression, so it picks the experts that matter
    most for a token. Weights are neither changed nor trained, so the result gets worse as fewer neurons are active.

    The mixture is a `Glm4MoeForCausalLM` of transformers, which plain `from_pretrained` loads. Its routing weights are 1 up to
    about 1e-4, whatever number of experts is active, so that with all of them active it computes what the dense model does.
    `from_pretrained(path, num_experts_per_tok=8)` changes the number.

    Args:
        model: a decoder of Llama's shape (Llama, Mistral, Qwen2, Qwen3, SmolLM2), which is unchanged.
        experts: number of parts of equal size that each feed-forward network is split into.
        top_k: number of experts that a token is routed to, besides the shared ones.
        calibration: as for `sparsekern.prune`. Some thousand tokens suffice.
        shared: how many of these parts hold the neurons of the largest mean squared activation. They are active for every token,
            as the mixture's shared expert, and no router chooses them. The paper has none.
        tokenizer: as for `sparsekern.prune`.
        samples: number of windows of a text; None is 32.
        length: as for `sparsekern.prune`.
        seed: seed of the clusters and of the windows. The same seed gives the same result.
        batch_size: as for `sparsekern.prune`.
        progress: show a progress bar.

    Returns:
        The mixture, in the dtype and on the device of `model`, which shares no memory with it.

    Raises:
        TypeError: an argument of another type.
        ValueError: `experts` does not divide the neurons, or into parts of no multiple of 16 bytes; `top_k` and `shared` exceed `experts`; a model of another shape, or one
            whose logits the mixture does not reproduce with all experts active.

    Example:
        >>> mixture = sparsekern.moefy(model, experts=4, top_k=2, calibration=ids, progress=False)
        >>> mixture.config.model_type, mixture.config.n_routed_experts
        ('glm4_moe', 3)
        >>> path = sparsekern.save(mixture, "mixture")

    Source: Zhang, Lin, Liu, Li, Sun and Zhou, MoEfication: Transformer feed-forward layers are mixtures of experts, 2021. There the
    clusters come from a graph partition, and the router is a network with a hidden layer.
    """
    check_module(model)
    refuse_streamed(model, "of which no mixture can be made")
    check_seed(seed)
    check_isa()
    _check_counts(experts, top_k, shared)
    if is_packed(model):
        raise ValueError("model: its linears are packed; sparsekern.unpack(model) makes them dense again")
    check_decoder(model)
    neurons = len(model.get_parameter("model.layers.0.mlp.up_proj.weight"))
    if neurons % experts:
        raise ValueError(f"experts: expected a divisor of {neurons}, the neurons of each feed-forward network, got {experts}")
    multiple = 16 // model.get_parameter("model.layers.0.mlp.up_proj.weight").element_size()
    if neurons // experts % multiple:
        raise ValueError(
            f"experts: expected experts of a multiple of {multiple} neurons, as grouped products need, got {neurons // experts}"
        )
    samples = SAMPLES if samples is None and is_source(calibration) else samples
    source = as_calibration(calibration, tokenizer=tokenizer, samples=samples, length=length, seed=seed, progress=progress)
    from tqdm import tqdm

    with plain_modes(model) as model:
        if isinstance(source, CalibrationText):
            source = source.read(model)
        device = next(model.parameters()).device
        batches = as_batches(source, batch_size, device, vocabulary(model), positions(model))
        with prepared(model, seed):
            blocks = len(find_blocks(model).modules)
            networks = tqdm(_inputs(model, batches), total=blocks, disable=not progress, unit="layer", desc="splitting")
            splits = [_split(network, x, experts, shared, seed) for network, x in networks]
            mixture = make_mixture(model, splits, top_k)
            _check_same(model, mixture, batches[0])
    return mixture


def _check_counts(experts: int, top_k: int, shared: int) -> None:
    check_count("experts", experts)
    check_count("top_k", top_k)
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        raise ValueError(f"shared: expected a whole number of at least 0, got {shared!r}")
    if experts < 2:
        raise ValueError(f"experts: expected at least 2, got {experts}")
    if top_k + shared > experts:
        raise ValueError(f"top_k: expected at most {experts - shared}, the experts besides {shared} shared ones, got {top_k}")


def _inputs(model: nn.Module, batches: list[Batch]) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Yield the feed-forward network of each block, and its inputs for all real tokens, `[tokens, hidden]` in float32."""
    blocks = find_blocks(model)
    gates = []
    for index, block in enumerate(blocks.modules):
        name = f"{blocks.block_name(index)}.mlp.{PARTS[0]}"
        gates.append(next(linear for linear in find_linears(block, blocks.block_name(index)) if linear.name == name))
    activations = Activations(model, batches, course_of(model, blocks, batches, [[gate] for gate in gates]))
    for index, gate in enumerate(gates):
        yield model.get_submodule(f"{blocks.block_name(index)}.mlp"), _rows(activations, index, gate)
        activations.advance(index)


def _rows(activations: Activations, index: int, gate: Linear) -> torch.Tensor:
    found = []
    for batch, inputs, *_ in activations.inputs_of(index, [gate], [gate.name]):
        rows, mask = batch.flatten(inputs[gate.name][0])
        found.append((rows if mask is None else rows[mask]).float())
    return torch.cat(found)


def _split(network: Any, x: torch.Tensor, experts: int, shared: int, seed: int) -> Split:
    """Return the experts of one feed-forward network for its inputs `x` `[tokens, hidden]`."""
    lengths = torch.linalg.vector_norm(network.down_proj.weight.float(), dim=0)

    def activation(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(network.up_proj.weight.dtype)
        return (network.act_fn(network.gate_proj(rows)) * network.up_proj(rows)).float().abs() * lengths

    size = len(lengths) // experts
    some = activation(x[:: -(-len(x) // COMPARED_TOKENS)])
    strongest = some.square().mean(0).argsort(descending=True, stable=True)
    always, rest = strongest[: shared * size].sort().values, strongest[shared * size :].sort().values
    some = some[:, rest]
    least = some.topk(max(1, int(ACTIVE_SHARE * len(rest))), dim=1).values[:, -1:]
    active = (some >= least) & (some > 0)
    clusters = balanced_clusters(active.T.float(), experts - shared, seed=seed)
    members = rest[clusters.argsort(stable=True)].view(experts - shared, size)
    weight, bias = _router(x, activation, members)
    return Split(always, members, weight, bias)


def _router(x: torch.Tensor, activation: Any, members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight and the bias of a router that predicts which experts have the largest sums of activations."""
    hidden = x.shape[1]
    gram = x.new_zeros(hidden + 1, hidden + 1)
    cross = x.new_zeros(len(members), hidden + 1)
    one = float(x.square().mean().sqrt())  # the input of the bias, as large as the others
    for rows in x.split(ROWS):
        sums = activation(rows)[:, members.flatten()].view(len(rows), *members.shape).sum(2)
        sums = F.normalize(sums - sums.mean(1, keepdim=True), dim=1)  # only differences within a token matter, each as much
        inputs = F.pad(rows, (0, 1), value=one)
        ops.gram_(gram, inputs)
        ops.cross_gram_(cross, sums, inputs)
    solution = ops.gram_solve(gram, cross, RIDGE)
    energy = sum(float((rows @ solution[:, :-1].T).square().sum()) for rows in x.split(ROWS))
    scale = TINY / max((energy / (len(x) * len(members))) ** 0.5, torch.finfo(torch.float32).tiny)
    return solution[:, :-1] * scale, solution[:, -1] * one * scale


def _check_same(model: nn.Module, mixture: nn.Module, batch: Batch) -> None:
    """Raise `ValueError` unless the mixture with all its experts computes what the dense model does."""
    routers: list[Any] = [module.gate for module in mixture.modules() if hasattr(module, "gate") and hasattr(module, "experts")]
    top_k = [router.top_k for router in routers]
    tokens = batch.first_sample_alone() or batch.inputs
    for router in routers:
        router.top_k = router.num_experts
    try:
        expected, found = (of(**tokens, use_cache=False).logits.float() for of in (model, mixture))
    finally:
        for router, number in zip(routers, top_k, strict=True):
            router.top_k = number
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= SAME[next(model.parameters()).dtype]:
        raise ValueError(
            f"model: expected a decoder of Llama's shape; a mixture with all weights of this {type(model).__name__} differs from it "
            f"by {difference:.1%} of the logits"
        )
