"""`prune` under modes of torch that its caller has set: the result is as without them, or the call is refused by name."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch

import sparsekern
from sparsekern.pruning.blockwise.trace import uncompiled
from sparsekern.pruning.checkpoint import Checkpoint
from tests import encoders
from tests.tiny import llama

IDS = torch.randint(320, (4, 32), generator=torch.Generator().manual_seed(0))
METHODS = {
    "random": None,
    "wanda": IDS,
    "sparsegpt": IDS,
    "copal": IDS,
    "gradual": IDS,
}


def config(method: str):
    return sparsekern.Gradual(steps=2, train_steps=1) if method == "gradual" else method


def pruned(method: str = "sparsegpt", model=None, **options) -> dict[str, torch.Tensor]:
    model = llama() if model is None else model
    sparsekern.prune(model, config(method), 0.5, METHODS[method], progress=False, **options)
    return {name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_device(None)


@contextmanager
def inference():
    with torch.inference_mode():
        yield
        assert torch.is_inference_mode_enabled()


@contextmanager
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        yield
        assert torch.is_autocast_enabled("cpu")


MODES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference_mode": inference,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": autocast,
    "deterministic": deterministic,
    "device meta": lambda: default_device("meta"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_modes(method):
    plain = pruned(method)
    for name, mode in MODES.items():
        model = llama()
        with mode():
            found = pruned(method, model)
        assert same(found, plain), name


def test_all_modes_at_once():
    plain, model = pruned(), llama()
    with ExitStack() as stack:
        for name in ("float64", "deterministic", "device meta", "autocast", "inference_mode"):
            stack.enter_context(MODES[name]())
        found = pruned(model=model)
    assert same(found, plain)


def test_ids_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        ids = IDS.clone()
        model = llama
    options = {"progress": False, "calibration": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]}
    first, second = model(), llama()
    sparsekern.prune(first, config("gradual"), 0.5, **options)
    options["calibration"] = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    sparsekern.prune(second, config("gradual"), 0.5, **options)
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("mode", ["float64", "inference_mode", "autocast", "deterministic", "device meta"])
def test_encoders_and_modes(mode):
    batches = encoders.one_by_one(encoders.padded_ids())
    plain, model = encoders.tiny("bert"), encoders.tiny("bert")
    sparsekern.prune(plain, "kprune", calibration=batches, progress=False)
    with MODES[mode]():
        sparsekern.prune(model, "kprune", calibration=batches, progress=False)
    assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("mode", ["float64", "inference_mode", "autocast", "device meta"])
def test_continual_runs_and_modes(mode):
    plain, model = llama(), llama()
    options = {"evaluate": {"a": IDS.flatten()}, "length": 32, "progress": False}
    expected = sparsekern.prune_continually(plain, {"a": IDS, "b": IDS + 1}, "wanda", **options)
    with MODES[mode]():
        report = sparsekern.prune_continually(model, {"a": IDS, "b": IDS + 1}, "wanda", **options)
    assert same(model.state_dict(), plain.state_dict()) and report.matrix == expected.matrix


def test_training_mode_and_dropout_are_put_back():
    plain, model = llama(), llama()
    for module in (plain, model):
        module.config.attention_dropout = 0.5
        for layer in module.model.layers:
            layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()
    assert same(pruned(model=model), pruned(model=plain))
    assert model.training and model.model.layers[1].mlp.training and not model.model.layers[0].mlp.training


def fails_if_compiled(*_, **__):
    raise AssertionError("a compiled forward ran")


@pytest.mark.parametrize("way", ["whole", "in place", "block in place", "forward"])
def test_compiled_models_run_eagerly_and_stay_compiled(way):
    model = llama()
    block = model.model.layers[0]
    given = torch.compile(model, backend=fails_if_compiled) if way == "whole" else model
    if way == "in place":
        model.compile(backend=fails_if_compiled)
    elif way == "block in place":
        block.compile(backend=fails_if_compiled)
    elif way == "forward":
        block.forward = torch.compile(block.forward, backend=fails_if_compiled)
    assert same(pruned(model=given), pruned())
    with pytest.raises(Exception, match="a compiled forward ran"):
        given(IDS)


def test_a_compiled_part_is_refused_by_name():
    model = llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(ValueError, match=r"model: model.layers.1 is wrapped by torch.compile; prune the model before"):
        pruned(model=model)


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = llama()
        with pytest.raises(ValueError, match="model: model.embed_tokens.weight was made under torch.inference_mode"):
            pruned(model=model)
    with pytest.raises(ValueError, match="model: model.embed_tokens.weight was made under torch.inference_mode"):
        pruned(model=model)


@pytest.mark.parametrize("quality", [None, "best"])
def test_weights_without_values_are_refused(quality):
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match="model: all its weights are on the meta device; load them before pruning"):
        sparsekern.prune(model, None, 0.5, METHODS["sparsegpt"], quality=quality, progress=False)


def test_transforms_and_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = llama()
    with pytest.raises(ValueError, match="expected a call outside of a torch.func transform"):
        torch.func.vmap(lambda x: (pruned(model=model), x)[1])(torch.ones(2))
    with FakeTensorMode(), pytest.raises(ValueError, match="expected a call outside of FakeTensorMode"):
        pruned(model=model)
    assert same(model.state_dict(), llama().state_dict())


def test_resuming_at_another_precision_of_products_is_said(tmp_path, monkeypatch):
    def interrupted(self, index, result, save=Checkpoint.save):
        save(self, index, result)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", interrupted)
        pruned(out=tmp_path / "out")
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.warns(sparsekern.SparsekernWarning, match="resumed with another float32_matmul; the result may differ"):
            pruned(out=tmp_path / "out", resume=True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def in_threads(*calls) -> list:
    """Run `calls` at once, and return what each returned."""
    results, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(index, call):
        barrier.wait()
        results[index] = call()

    threads = [threading.Thread(target=run, args=(index, call)) for index, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("method", ["random", "gradual"])
def test_threads_draw_the_same_numbers(method):
    def model():
        made = llama()
        for layer in made.model.layers:
            layer.self_attn.attention_dropout = 0.3
        return made

    expected = [pruned(method, model(), seed=seed) for seed in range(4)]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    models = [model() for _ in range(4)]
    torch.set_rng_state(before)
    found = in_threads(*(lambda seed=seed: pruned(method, models[seed], seed=seed) for seed in range(4)))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_leave_modes_and_warnings_alone():
    few = IDS[:1, :4]
    filters, dtype = list(warnings.filters), torch.get_default_dtype()

    models = [llama() for _ in range(4)]

    def prune(model):
        return sparsekern.prune(model, sparsekern.SparseGPT(damping=0.0), 0.5, few, progress=False)

    with warnings.catch_warnings(record=True) as caught, default_dtype(torch.float64):
        warnings.simplefilter("always")
        assert all(in_threads(*(lambda model=model: prune(model) for model in models)))
    assert list(warnings.filters) == filters and torch.get_default_dtype() == dtype
    named = [str(warning.message) for warning in caught if "not positive definite" in str(warning.message)]
    assert named and all(message.startswith("model.layers.") for message in named)


def test_runs_that_overlap_put_back_what_the_first_found():
    from sparsekern.pruning.process import PutBack

    setting = {"a": 1}
    shared = PutBack(setting.__getitem__, setting.__setitem__)
    first, second = shared.kept("a"), shared.kept("a")
    first.__enter__()
    setting["a"] = 2
    second.__enter__()
    first.__exit__(None, None, None)
    assert setting["a"] == 2
    second.__exit__(None, None, None)
    assert setting["a"] == 1


def test_runs_that_overlap_leave_compilation_as_it_was():
    model, graphs = llama(), []
    first, second = uncompiled(model), uncompiled(model)
    doubled = torch.compile(lambda x: 2 * x, backend=lambda graph, inputs: graphs.append(graph) or graph)
    with second:
        first.__enter__()
        doubled(torch.ones(2))
        assert not graphs
    doubled(torch.ones(2))
    assert not graphs  # the first run is still under way
    first.__exit__(None, None, None)
    doubled(torch.ones(2))
    assert len(graphs) == 1
