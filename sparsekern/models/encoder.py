"""An encoder as a chain of sub-layers that can be measured, cut, and run from any of them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .linears import Linear, find_linears

EXPECTED = (
    "an encoder whose blocks are attention (query, key, value, output) and an FFN of two linears, each followed by a LayerNorm, "
    "as BERT, RoBERTa, DistilBERT and MiniLM have them"
)
Visit = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Place:
    """A child of a module and the name to replace it under."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """The child."""
        return getattr(self.parent, self.attribute)

    def put(self, module: nn.Module) -> None:
        """Replace the child."""
        setattr(self.parent, self.attribute, module)


@dataclass(frozen=True, eq=False)
class SubLayer:
    """`norm(x + out(features(x)))`, whose features come in units.

    Attributes:
        name: name of the block.
        kind: `"heads"` or `"neurons"`.
        owner: the module that computes the features. The output projection is inside it (DistilBERT) or behind it (BERT).
        inputs: linears whose rows make the features.
        output: where the output projection is.
        out: the output projection.
        norm: the LayerNorm behind it.
        head_size: channels of a unit; 1 for neurons.
    """

    name: str
    kind: str
    owner: Place
    inputs: tuple[nn.Linear, ...]
    output: Place
    out: nn.Linear
    norm: nn.LayerNorm
    head_size: int

    @property
    def units(self) -> int:
        """Number of units."""
        return self.out.in_features // self.head_size

    @property
    def owns_output(self) -> bool:
        """Whether the output projection is inside `owner`."""
        return any(module is self.output.parent for module in self.owner.module.modules())

    def features(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return what the output projection reads, `[samples, length, units * head_size]`; valid while the encoder is `opened`."""
        if self.kind == "heads":
            return self.owner.module(x, attention_mask=attention_mask)[0]
        return self.owner.module(x)


class Encoder:
    """The sub-layers of a transformers encoder, bottom to top, attention before the feed-forward network.

    `opened` checks that the sub-layers compute what the model does.

    Raises:
        ValueError: the model is a decoder, or its blocks have another structure.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        name = type(model).__name__
        config = getattr(model, "config", None)
        causal = any(getattr(module, "is_causal", False) for module in model.modules())
        if causal or getattr(model, "can_generate", bool)() or getattr(config, "is_decoder", False):
            raise ValueError(f"model: expected {EXPECTED}; {name} is a decoder")
        blocks = _list_of_blocks(model)
        heads = getattr(config, "num_attention_heads", None)
        self._name, self._list = blocks, _place(model, blocks)
        self.sublayers: list[SubLayer] = []
        for index, block in enumerate(self._list.module.children()):
            self.sublayers += _sublayers(name, block, f"{blocks}.{index}", heads)

    @property
    def linears(self) -> list[Linear]:
        """The linears of all sub-layers.

        Raises:
            ValueError: a weight is not a plain matrix of a known dtype.
        """
        return find_linears(self._list.module, self._name)

    @contextmanager
    def opened(self, inputs: dict[str, torch.Tensor]) -> Iterator[Chain]:
        """Replace the blocks by a chain of sub-layers inside a `with` block.

        Args:
            inputs: keyword arguments of a first batch, on which the chain is compared with the model.

        Raises:
            ValueError: the chain computes something else than the blocks.
        """
        blocks = self._list.module
        *_, last = blocks.children()
        expected, returns_tuple = _output_of(self.model, last, inputs)
        chain = Chain(self.model, self.sublayers, returns_tuple)
        inside = [sublayer for sublayer in self.sublayers if sublayer.owns_output]
        try:
            for sublayer in inside:
                sublayer.output.put(nn.Identity())
            self._list.put(nn.ModuleList([chain]))
            try:
                chain.run(inputs)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                # The model's own code met sub-layers that are called as BERT's are: whatever it stumbles over, this is why.
                what = f"the blocks of {type(self.model).__name__} are called otherwise ({type(error).__name__}: {error})"
                raise ValueError(f"model: expected {EXPECTED}; {what}") from error
            if chain.last is None or not torch.allclose(chain.last, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(f"model: expected {EXPECTED}; the blocks of {type(self.model).__name__} compute something else")
            yield chain
        finally:
            self._list.put(blocks)
            for sublayer in inside:
                sublayer.output.put(sublayer.out)


class Chain(nn.Module):
    """A stand-in for all blocks that runs the sub-layers from `start` on, from stored hidden states.

    Embeddings, attention mask, pooler and head stay the model's own.
    """

    def __init__(self, model: nn.Module, sublayers: list[SubLayer], returns_tuple: bool) -> None:
        super().__init__()
        self._run_model = model.__call__  # a bound method: the model must not become a child of its own child
        self._sublayers, self._returns_tuple = tuple(sublayers), returns_tuple
        self._start = 0
        self._stored: torch.Tensor | None = None
        self._visit: Visit | None = None
        self.embedded: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        self.last: torch.Tensor | None = None

    def run(
        self, inputs: dict[str, torch.Tensor], start: int = 0, stored: torch.Tensor | None = None, visit: Visit | None = None
    ) -> object:
        """Return the model's output, computed from sub-layer `start` on.

        Args:
            inputs: keyword arguments of the model.
            start: the first sub-layer to run.
            stored: its input; None takes the embeddings.
            visit: called as `visit(index, features)` with the features of each sub-layer; returns those to continue with.
        """
        self._start, self._stored, self._visit = start, stored, visit
        try:
            return self._run_model(**inputs)
        finally:
            self._stored = self._visit = None

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args, **kwargs):
        self.embedded, self.attention_mask = hidden_states, attention_mask
        x = hidden_states if self._stored is None else self._stored
        for index in range(self._start, len(self._sublayers)):
            sublayer = self._sublayers[index]
            features = sublayer.features(x, attention_mask)
            if self._visit is not None:
                features = self._visit(index, features)
            x = sublayer.norm(x + sublayer.out(features))
        self.last = x.detach()
        return (x,) if self._returns_tuple else x


def is_encoder(model: nn.Module) -> bool:
    """Return whether `Encoder` knows the structure of `model`."""
    try:
        Encoder(model)
    except ValueError:
        return False
    return True


def _list_of_blocks(model: nn.Module) -> str:
    """Return the name of the list with the most linears below it; of equals the outer one.

    Unlike `find_blocks` this reads no weights: a model that is being loaded has none yet.
    """
    most, best = 0, None
    for name, modules in model.named_modules():
        linears = sum(isinstance(module, nn.Linear) for module in modules.modules()) if isinstance(modules, nn.ModuleList) else 0
        if linears > most:
            most, best = linears, name
    if best is None:
        raise ValueError(f"model: expected {EXPECTED}; {type(model).__name__} holds no list of blocks with linears")
    return best


def _sublayers(model: str, block: nn.Module, name: str, heads: int | None) -> tuple[SubLayer, SubLayer]:
    """Return the attention and the feed-forward network of a block: six linears in the order of their use, recognised by shape."""
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
    if heads is None or not _is_encoder_block(list(linears.values()), len(norms), heads):
        shapes = ", ".join(f"{linear.in_features} to {linear.out_features}" for linear in linears.values())
        raise ValueError(
            f"model: expected {EXPECTED}; {name} of {model} holds {len(norms)} LayerNorms and the linears {shapes or 'none'}"
        )
    paths, modules = list(linears), list(linears.values())
    owners = [paths[index].rpartition(".")[0] for index in (0, 4)]
    within = [[path for path in paths if path.startswith(f"{owner}.")] for owner in owners]
    if within[0] not in (paths[:3], paths[:4]) or within[1] not in (paths[4:5], paths[4:]):
        raise ValueError(
            f"model: expected {EXPECTED}; {name} of {model} does not compute its attention and its FFN in a module each"
        )
    attention, ffn = (_place(block, owner) for owner in owners)
    head_size = modules[0].out_features // heads
    return (
        SubLayer(name, "heads", attention, tuple(modules[:3]), _place(block, paths[3]), modules[3], norms[0], head_size),
        SubLayer(name, "neurons", ffn, (modules[4],), _place(block, paths[5]), modules[5], norms[1], 1),
    )


def _is_encoder_block(linears: list[nn.Linear], norms: int, heads: int) -> bool:
    if len(linears) != 6 or norms != 2 or not heads or any(linear.bias is None for linear in linears):
        return False
    (hidden, width), neurons = (linears[0].in_features, linears[0].out_features), linears[4].out_features
    shapes = [(linear.in_features, linear.out_features) for linear in linears]
    return shapes == [(hidden, width)] * 3 + [(width, hidden), (hidden, neurons), (neurons, hidden)] and width % heads == 0


def _place(root: nn.Module, path: str) -> Place:
    parent, _, attribute = path.rpartition(".")
    return Place(root.get_submodule(parent), attribute)


def _output_of(model: nn.Module, block: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Return what `block` returns when the model runs, and whether that is a tuple."""
    seen = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"model: the last block of {type(model).__name__} did not run")
    output = seen[-1]
    return (output[0], True) if isinstance(output, tuple) else (output, False)
