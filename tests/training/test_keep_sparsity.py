"""Zeros stay zero: through every kind of optimizer, a Trainer, a merge; and nothing of the model is changed by guarding it."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

import sparsekern
from tests import tiny
from tests.models.families import tiny_ids, tiny_model


def pruned(family: str = "llama", dtype: torch.dtype = torch.float32, pattern="2:4"):
    model = tiny_model(family, dtype).train().requires_grad_(True)
    sparsekern.prune(model, "magnitude", pattern, progress=False)
    return model


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight == 0 for name, weight in model.named_parameters() if ".layers." in name and weight.dim() == 2}


def still_zero(model: nn.Module, zeros: dict[str, torch.Tensor]) -> bool:
    weights = dict(model.named_parameters())
    return all(not weights[name][zero].any() for name, zero in zeros.items()) and any(map(torch.any, zeros.values()))


def backward(model: nn.Module, seed: int = 0) -> torch.Tensor:
    ids = tiny_ids(2, 8, seed)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach()


class FactoredAdam(torch.optim.Optimizer):
    """After Adafactor: a second moment of row and column means, so that every weight of a row moves by what the others saw."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                square = parameter.grad.square() + 1e-30
                scale = square.mean(-1, keepdim=True)
                if parameter.dim() == 2:
                    scale = scale * square.mean(0) / square.mean()
                parameter.add_(parameter.grad / scale.sqrt() + 0.1, alpha=-group["lr"])  # and a drift that no gradient explains


OPTIMIZERS = {
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "an optimizer of one's own": FactoredAdam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero(name):
    model = pruned()
    zeros, before = zeros_of(model), copy.deepcopy(model.state_dict())
    with sparsekern.keep_sparsity(model) as keeper:
        optimizer = OPTIMIZERS[name](model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        for step in range(3):
            backward(model, step)
            backward(model, step + 10)  # accumulated
            assert still_zero_gradients(model, zeros)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert still_zero(model, zeros)
    assert keeper.sparsity == 0.5 and len(keeper.names) == 21
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert set(moved) == set(before)
    for name, zero in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, zero)


def still_zero_gradients(model, zeros) -> bool:
    return all(not model.get_parameter(name).grad[zero].any() for name, zero in zeros.items())


def test_without_it_they_do_not():
    model = pruned()
    zeros = zeros_of(model)
    optimizer = torch.optim.AdamW(model.parameters())
    backward(model)
    optimizer.step()
    assert not still_zero(model, zeros)


def test_momentum_of_the_dense_model_is_undone():
    model = tiny_model("llama").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    backward(model)
    optimizer.step()
    sparsekern.prune(model, "magnitude", 0.5, progress=False)
    zeros = zeros_of(model)
    with sparsekern.keep_sparsity(model):
        backward(model)
        optimizer.step()
        assert still_zero(model, zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_and_a_gradient_that_overflows(dtype):
    layer = nn.Linear(8, 8, dtype=dtype)
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    keeper = sparsekern.keep_sparsity(layer)
    (layer.weight * float("inf")).sum().backward()
    assert not layer.weight.grad[:, ::2].any()  # 0 * inf is NaN: masked, not multiplied
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    assert not layer.weight[:, ::2].any()
    keeper.remove()


def test_float32_masters_outside_of_the_model():
    """What mixed-precision wrappers do: the optimizer owns float32 copies, and no hook sees them being written back."""
    model = pruned(dtype=torch.bfloat16)
    zeros, parameters = zeros_of(model), list(model.parameters())
    with sparsekern.keep_sparsity(model):
        masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
        optimizer = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.1)
        for step in range(2):
            backward(model, step)
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, parameters, strict=True):
                    parameter.copy_(master)
            assert still_zero(model, zeros)


def test_grad_scaler_and_autocast():
    model = pruned()
    zeros = zeros_of(model)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(model.parameters())
    with sparsekern.keep_sparsity(model):
        ids = tiny_ids(2, 8)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert still_zero(model, zeros)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt"])
def test_tied_weights_and_transposed_ones(family):
    model = pruned(family)
    with sparsekern.keep_sparsity(model) as keeper:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        backward(model)
        optimizer.step()
        assert all(not model.get_submodule(name).weight[~mask].any() for name, mask in keeper.masks.items())
        assert not any("lm_head" in name or "embed" in name for name in keeper.names)


def test_a_weight_of_two_linears_is_guarded_once():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    with torch.no_grad():
        first.weight[0] = 0
    model = nn.Sequential(first, second)
    with sparsekern.keep_sparsity(model) as keeper:
        model(torch.randn(3, 8)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9).step()
        assert keeper.names == ("0",) and not second.weight[0].any() and second.weight[1].any()


def test_only_what_an_optimizer_steps_is_written_to():
    """Between another's forward and backward, autograd forbids it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[0] = 0
    with sparsekern.keep_sparsity(model):
        loss = model(torch.randn(3, 8)).square().sum()
        other = nn.Parameter(torch.ones(3))
        other.sum().backward()
        torch.optim.SGD([other], lr=0.1).step()
        loss.backward()
        assert not model[1].weight.grad[0].any()


def test_what_is_guarded_by_default():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 0  # pruned
        model[1].weight.zero_()  # the second half of a fresh adapter: to hold it at zero would be to hold the adapter at nothing
        model[3].weight[0] = 0  # the row of a padding token
    model[4].weight = model[3].weight
    assert sparsekern.keep_sparsity(model).names == ("0",)
    assert sparsekern.keep_sparsity(model, include=["0", "1"], exclude="0").names == ("1",)
    assert repr(sparsekern.keep_sparsity(model)) == "SparsityKeeper(1 linears, 25.00% of their weights kept at zero)"


def test_the_model_itself_is_as_it_was():
    model = pruned()
    before = {name: id(value) for name, value in model.named_parameters()}, [*model.state_dict()], [*model.named_buffers()]
    keeper = sparsekern.keep_sparsity(model)
    assert (
        {name: id(value) for name, value in model.named_parameters()},
        [*model.state_dict()],
        [*model.named_buffers()],
    ) == before
    torch.save(model.state_dict(), io.BytesIO())
    twin = copy.deepcopy(model)
    zeros = zeros_of(twin)
    backward(twin)
    torch.optim.AdamW(twin.parameters()).step()
    assert not still_zero(twin, zeros)  # a copy is a model of its own
    keeper.remove()
    keeper.remove()
    backward(model)
    torch.optim.AdamW(model.parameters()).step()
    assert not still_zero(model, zeros)


def test_a_model_is_freed_although_it_is_guarded():
    model, before = pruned(), len(hooks)
    sparsekern.keep_sparsity(model)
    assert len(hooks) == before + 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and len(hooks) == before


def test_a_compiled_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsekern.prune(nn.ModuleList([model[0], model[2]]), "magnitude", 0.5, progress=False)
    zeros = [layer.weight == 0 for layer in (model[0], model[2])]
    with sparsekern.keep_sparsity(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            compiled(torch.randn(4, 8)).square().sum().backward()
            assert not any(layer.weight.grad[zero].any() for layer, zero in zip((model[0], model[2]), zeros, strict=True))
            optimizer.step()
            assert not any(layer.weight[zero].any() for layer, zero in zip((model[0], model[2]), zeros, strict=True))


def test_a_compiled_optimizer():
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[0] = 0
    with sparsekern.keep_sparsity(layer):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(2):
            layer(torch.ones(1, 8)).sum().backward()
            with torch.no_grad():
                layer.weight[0] = 1  # as momentum from before would
            step()
            assert not layer.weight[0].any() and layer.weight[1].any()


def test_with_a_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny.llama()
    sparsekern.prune(model, "magnitude", 0.5, progress=False)
    zeros = zeros_of(model)
    ids = torch.randint(0, 320, (8, 8), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        learning_rate=1e-2,
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    keeper = sparsekern.keep_sparsity(model)
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[keeper])
    assert trainer.train().global_step == 2
    assert still_zero(model, zeros)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-1")
    assert still_zero(saved, zeros)
    with pytest.raises(AttributeError, match="SparsityKeeper has no attribute 'of_step_end'"):
        keeper.of_step_end  # noqa: B018


def test_the_callback_masks_what_no_hook_saw():
    model = pruned()
    zeros, keeper = zeros_of(model), sparsekern.keep_sparsity(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    keeper.on_step_end(None, None, None, model=model)
    assert still_zero(model, zeros)


def test_a_replaced_parameter_is_still_masked():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0] = 0
    with sparsekern.keep_sparsity(layer):
        layer.weight = nn.Parameter(torch.ones(4, 4))
        layer(torch.ones(1, 4)).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert not layer.weight[0].any() and layer.weight[1].all()


@pytest.mark.parametrize(
    "model, arguments, error, message",
    [
        ("gpt2", {}, TypeError, "model: expected a module with pruned linears, got str"),
        (nn.Linear(4, 4), {}, ValueError, "model: expected linears with zeros to keep, found none in Linear; prune it first"),
        (nn.Linear(4, 4), {"include": "fc*"}, ValueError, r"include: 'fc\*' matches no linear of the model"),
        (nn.Linear(4, 4), {"exclude": ["fc"]}, ValueError, "exclude: 'fc' matches no linear of the model"),
    ],
)
def test_bad_input(model, arguments, error, message):
    with pytest.raises(error, match=message):
        sparsekern.keep_sparsity(model, **arguments)
