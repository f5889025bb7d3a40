"""Tasks of lm-evaluation-harness: what its results become, on a stand-in of its interfaces, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

import sparsekern
from sparsekern.cli import main
from sparsekern.measure import tasks
from sparsekern.measure.tasks import TaskResult, Tasks, check_harness, results_of
from tests import tiny

RESULTS = {
    "colours": {"alias": "colours", "acc,none": 0.5, "acc_stderr,none": 0.25, "sample_len": 4, "name": "colours"},
    "sums": {"alias": "sums", "exact_match,strict": 1, "exact_match_stderr,strict": "N/A"},
}
MEASURED = {"task colours, acc": 0.5, "task sums, exact_match (strict)": 1.0}
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: make test-tasks")


@pytest.fixture
def harness(monkeypatch):
    """A stand-in of lm-evaluation-harness, which notes its calls in `calls`."""
    calls = []

    class TaskManager:
        def load(self, names):
            (name,) = names
            if name == "unknown":
                raise KeyError(name)
            if name == "distant":
                raise ConnectionError("Couldn't reach\n'allenai/distant' on the Hub")
            return {"tasks": {name: f"task {name}"}, "groups": {"both": "group both"} if name == "both" else {}}

    def simple_evaluate(**arguments):
        calls.append(arguments)
        return {"results": RESULTS}

    content = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **arguments: SimpleNamespace(**arguments)},
    }
    for name, names in content.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tasks, "check_harness", lambda: None)
    monkeypatch.setattr("sparsekern.cli.evaluate.check_harness", lambda: None)
    return calls


def test_results_are_metrics_with_their_errors():
    assert results_of(RESULTS) == [
        TaskResult("colours", "acc", 0.5, 0.25),
        TaskResult("sums", "exact_match (strict)", 1.0, None),
    ]
    assert str(results_of(RESULTS)[0]) == "colours  acc 0.5000 ± 0.2500" and str(results_of(RESULTS)[1]).endswith("1.0000")
    assert tasks.measured(results_of(RESULTS)) == MEASURED


def test_a_model_is_measured_in_evaluation_mode(harness):
    model, words = tiny.llama().train(), SimpleNamespace(bos_token_id=None, eos_token_id=2)
    found = Tasks(["colours", "both"]).evaluate(model, words, batch_size=3, examples=2)
    (call,) = harness
    assert call["tasks"] == ["task colours", "group both"] and call["limit"] == 2 and not call["log_samples"]
    assert vars(call["model"]) == {"pretrained": model, "tokenizer": words, "batch_size": 3}
    assert found == results_of(RESULTS) and model.training


def test_what_is_refused(harness, tmp_path):
    with pytest.raises(ValueError, match="tasks: expected tasks of lm-evaluation-harness, or YAML files, got 'unknown'"):
        Tasks(["colours", "unknown"])
    with pytest.raises(
        OSError, match="tasks: the data of distant cannot be loaded: Couldn't reach 'allenai/distant' on the Hub; fetch"
    ):
        Tasks(["distant"])
    sparsekern.save(tiny.llama(), tmp_path / "model")
    streamed = sparsekern.load(tmp_path / "model", stream=True)
    with pytest.raises(ValueError, match="tasks: expected a model in memory, got a streamed one"):
        Tasks(["colours"]).evaluate(streamed, None)
    with pytest.raises(ValueError, match="tokenizer: expected one with a BOS or an EOS token, with which a text begins, got one"):
        Tasks(["colours"]).evaluate(tiny.llama(), tiny.tokenizer())


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_the_harness_the_extra_is_named(capsys):
    with pytest.raises(ImportError, match=r"lm_eval needed for tasks: pip install 'sparsekern\[tasks\]'"):
        check_harness()
    assert main(["eval", "model", "--tasks", "colours"]) == 2
    assert "sparsekern eval: error: lm_eval needed for tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--examples", "3"], "--examples: expected --tasks"),
        (["--tasks", "a", "--stream"], "--tasks: expected one process and no --stream"),
        (["--record"], "--record: expected a folder with a finished run"),
    ],
)
def test_options_that_contradict_each_other(harness, capsys, options, message):
    assert main(["eval", "model", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("names", ["a,,b", ""])
def test_names_are_between_commas(capsys, names):
    with pytest.raises(SystemExit):
        main(["eval", "model", "--tasks", names])
    assert f"--tasks: expected names with commas between them, got {names!r}" in capsys.readouterr().err


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder that `sparsekern prune` wrote, packed, with a tokenizer whose texts can begin."""
    monkeypatch.setattr(PreTrainedTokenizerFast, "eos_token_id", 5, raising=False)
    model, out = tiny.save_folder(tmp_path / "model"), tmp_path / "out"
    assert main(["prune", str(model), "--method", "magnitude", "--format", "packed", "--out", str(out)]) == 0
    return out


def test_results_go_into_report_and_card(harness, run_folder, capsys):
    before = (run_folder / "README.md").read_text()
    for _ in range(2):  # the second time they are replaced
        assert main(["eval", str(run_folder), "--tasks", "colours,sums", "--record"]) == 0
    assert "colours  acc 0.5000 ± 0.2500\n" in capsys.readouterr().out
    assert json.loads((run_folder / "report.json").read_text())["results"]["measured"] == MEASURED
    card = (run_folder / "README.md").read_text()
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in ModelCard(card).data.eval_results}
    assert found == {("colours", "acc"): 0.5, ("sums", "exact_match (strict)"): 1.0}
    added = [line for line in card.partition("\n---\n")[2].splitlines() if line not in before.splitlines()]
    assert added == ["| task colours, acc | 0.5 |", "| task sums, exact_match (strict) | 1 |"]
    assert card.index("## Results") < card.index("| task colours") < card.index("## Settings")


def test_a_perplexity_is_recorded_too(run_folder, tmp_path):
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    assert main(["eval", str(run_folder), "--text", str(tmp_path / "text.txt"), "--windows", "1", "--record"]) == 0
    measured = json.loads((run_folder / "report.json").read_text())["results"]["measured"]
    (found,) = ModelCard.load(run_folder / "README.md").data.eval_results
    assert found.metric_value == measured["perplexity, pruned"] and found.dataset_name == measured["evaluated on"]


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
QUESTIONS = [
    {"question": "the quick brown", "choices": [" fox", " the dog"], "answer": 0},
    {"question": "over the lazy", "choices": [" dog", " quick brown"], "answer": 1},
    {"question": "the", "choices": [" lazy", " fox jumps"], "answer": 0},
]


@needs_harness
@pytest.mark.filterwarnings("ignore")  # of many packages
@pytest.mark.parametrize("packed", [False, True])
def test_the_real_harness_chooses_the_likelier_answer(tmp_path, monkeypatch, packed):
    """The share of right answers, against sums of log-likelihoods in float64."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, task = tmp_path / "data.jsonl", tmp_path / "colours.yaml"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    task.write_text(TASK.replace("FILE", str(data)))
    model, words = tiny.llama(), tiny.tokenizer()
    words.eos_token = words.convert_ids_to_tokens(5)
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    right = [likeliest(model, words, **question) == question["answer"] for question in QUESTIONS]
    if packed:
        sparsekern.pack(model)
    (found,) = Tasks([str(task)]).evaluate(model, words, batch_size=2)
    assert (found.task, found.metric, found.value) == ("colours", "acc", sum(right) / len(right))


def likeliest(model, words, question: str, choices: list[str], answer: int) -> int:
    def score(choice: str) -> float:
        whole, begin = words(question + choice)["input_ids"], len(words(question)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits.double()
        likelihoods = F.log_softmax(logits, -1)[0, torch.arange(len(whole) - 1), torch.tensor(whole[1:])]
        return float(likelihoods[begin - 1 :].sum())

    return max(range(len(choices)), key=lambda number: score(choices[number]))


@needs_harness
@pytest.mark.filterwarnings("ignore")
def test_the_real_harness_names_the_data_that_it_lacks(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="tasks: the data of piqa cannot be loaded: .*piqa.*; fetch them once where there is a network"
    ):
        Tasks(["piqa"])
    with pytest.raises(ValueError, match="got 'no-such-task'"):
        Tasks(["no-such-task"])
