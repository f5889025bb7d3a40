"""Toy models that run their blocks in every way, and pruning by hooks on whole forwards, block after block."""

from dataclasses import dataclass

import torch
from torch import nn

from sparsekern.models import find_linears

WIDTH = 8


def mix() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = mix(), mix()

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = mix()

    def forward(self, x):
        return x * torch.sigmoid(self.gate(x))


class Biased(Plain):
    """The first one makes a bias, which all return."""

    def forward(self, x, bias=None):
        made = torch.tanh(self.up(x))
        bias = made if bias is None else bias
        return x + self.down(made + bias), None, bias


class Writing(Plain):
    """Writes to a container that later blocks read."""

    def __init__(self, key, reads=None):
        super().__init__()
        self.key, self.reads = key, reads

    def forward(self, hidden_states, shared):
        made = torch.tanh(self.up(hidden_states))
        if isinstance(shared, list):
            shared.append(made)
        else:
            shared[self.key] = (made, 1)
        if self.reads is not None:
            made = made + (shared[self.reads] if isinstance(shared, list) else shared[self.reads][0])
        return hidden_states + self.down(made)


class Crossing(Plain):
    def __init__(self):
        super().__init__()
        self.cross = mix()

    def forward(self, x, states):
        return x + self.down(torch.tanh(self.up(x)) + self.cross(states).mean(1, keepdim=True))


@dataclass
class Output:
    first: torch.Tensor
    names: tuple


class Wrapped(Plain):
    def forward(self, x):
        return Output(super().forward(x), ("a",))


class Model(nn.Module):
    """Called like a transformers model; `way` says how it runs its blocks."""

    def __init__(self, way: str, blocks: list[nn.Module], encoder: list[nn.Module] = ()):
        super().__init__()
        self.way, self.embed = way, nn.Embedding(16, WIDTH)
        if encoder:
            self.encoder = nn.ModuleList(encoder)
        self.layers = nn.ModuleList(blocks)

    def forward(self, input_ids, flag=None, use_cache=None):
        x = self.embed(input_ids)
        return getattr(self, self.way)(x)

    def chain(self, x):
        for block in self.layers:
            x = block(x)
        return x

    def doubled(self, x):
        for block in self.layers:
            x = block(x) * 1.5
        return x

    def in_place(self, x):
        for block in self.layers:
            x = block(x).mul_(1.5)
        return x

    def backwards(self, x):
        for block in reversed(self.layers):
            x = block(x)
        return x

    def sliced(self, x):
        for block in self.layers:
            x = block(x)[:, -6:]
        return x

    def biased(self, x):
        bias = None
        for block in self.layers:
            x, _, bias = block(x, bias=bias)
        return x

    def mapping(self, x):
        shared = {}
        for block in self.layers:
            x = block(hidden_states=x, shared=shared)
        return x

    def listed(self, x):
        shared = []
        for block in self.layers:
            x = block(x, shared)
        return x

    def skipping(self, x):
        states = []
        for block in self.layers:
            x = block(x if len(states) < 2 else x + states[0])
            states.append(x)
        return x

    def wrapped(self, x):
        for block in self.layers:
            x = block(x).first
        return x

    def named(self, x):
        for block in self.layers:
            x = block(x=x)
        return x

    def crossing(self, x):
        states = x * 0.5
        for block in self.encoder:
            states = block(states)
        states = torch.tanh(states)
        for block in self.layers:
            x = block(x, states)
        return x


def plain(count=3):
    return [Plain() for _ in range(count)]


WAYS = {
    "chain": lambda: ([Plain(), nn.Identity(), Other(), Plain()],),
    "doubled": lambda: (plain(),),
    "in_place": lambda: (plain(),),
    "backwards": lambda: (plain(),),
    "sliced": lambda: (plain(),),
    "biased": lambda: ([Biased() for _ in range(4)],),
    "mapping": lambda: ([Writing(0), Writing(1), Writing(2, reads=0), Writing(3, reads=1)],),
    "listed": lambda: ([Writing(0), Writing(1), Writing(2, reads=0), Writing(3, reads=1)],),
    "skipping": lambda: (plain(4),),
    "wrapped": lambda: ([Wrapped() for _ in range(3)],),
    "named": lambda: (plain(),),
    "crossing": lambda: ([Crossing() for _ in range(2)], [Plain(), Other()]),
}


def toy(way: str) -> Model:
    torch.manual_seed(0)
    return Model(way, *WAYS[way]()).eval()


def calls(lengths=(8, 7, 8)) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(16, (2, length), generator=generator)} for length in lengths]


def oracle(model, samples, blocks: list[str], mask_of=lambda name, call: None) -> None:
    """Prune 2:4 by Wanda, in place: for every block whole forwards, whose linears are watched one by one."""
    for name in blocks:
        linears = {linear.name: linear for linear in find_linears(model.get_submodule(name), name)}
        squares = {linear: torch.zeros(found.features, dtype=torch.float64) for linear, found in linears.items()}
        for call in samples:
            handles = []
            for linear, found in linears.items():
                mask = mask_of(linear, call)

                def watch(module, args, total=squares[linear], mask=mask):
                    rows = args[0].double().flatten(0, -2)
                    total += (rows if mask is None else rows[mask.flatten().bool()]).square().sum(0)

                handles.append(found.modules[0].register_forward_pre_hook(watch))
            with torch.no_grad():
                model(**call)
            for handle in handles:
                handle.remove()
        for linear, found in linears.items():
            scores = (found.weight.double().abs() * squares[linear].sqrt()).unflatten(1, (-1, 4))
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2, dim=2).indices, True)
            found.weight[~kept.flatten(1)] = 0


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, wanted), name
