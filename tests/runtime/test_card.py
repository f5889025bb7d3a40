"""The model card: what it shows, and that nothing in it is read as markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import sparsekern
from sparsekern.models import load as loading
from sparsekern.models.source import Source
from sparsekern.runtime import model_card, versions
from sparsekern.runtime.card import with_results
from tests import encoders, tiny

NASTY = [
    "a\n# Heading",
    "a\r\n| cell | cell |",
    "```\n<script>alert(1)</script>\n```",
    "a | b",
    "[text](http://example.com)",
    "![image](http://example.com/x.png)",
    "<img src=x onerror=alert(1)>",
    "**bold** `code`",
    "back\\slash \\| pipe",
    "a\x00b\u2028c\u202ed",
]


def rows(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("| ") and line != "| | |"]


@pytest.mark.parametrize("text", NASTY)
def test_a_cell_is_one_line_of_text(text):
    plain = model_card(tiny.llama(), settings={"text": "x"})
    for settings in ({"text": text}, {text: "x"}):
        card = model_card(tiny.llama(), settings=settings)
        assert len(card.splitlines()) == len(plain.splitlines())
        (row,) = [line for line in rows(card) if line not in rows(plain)]
        cells = row.replace("\\\\", "").replace("\\|", "")
        assert cells.count("|") == 3, row
        unescaped = [char for before, char in zip(" " + cells, cells, strict=False) if char in "`*[]<>" and before != "\\"]
        assert not unescaped, row


@pytest.mark.parametrize("text", NASTY)
def test_a_command_does_not_leave_its_block(text):
    card = model_card(tiny.llama(), command=f"sparsekern prune {text}", results={"perplexity": 3.14159})
    lines = card.splitlines()
    begin = lines.index("Made with:") + 2
    fence = lines[begin]
    end = next(
        number for number in range(begin + 1, len(lines)) if set(lines[number]) == {"`"} and len(lines[number]) >= len(fence)
    )
    block = "\n".join(lines[begin + 1 : end])
    assert set(fence) == {"`"} and block.split() == f"sparsekern prune {text}".split()
    assert "## Results" in lines[end + 1 :] and "| perplexity | 3.142 |" in lines[end + 1 :]


@pytest.mark.parametrize("text", NASTY)
def test_the_name_of_a_tensor_is_text(text):
    model = tiny.llama()
    plain = len(model_card(model).splitlines())
    model.sparsekern_source = Source(Path("/nowhere"), "nowhere", tensors=(text, "b"))
    card = model_card(model)
    assert len(card.splitlines()) == plain + 2
    (line,) = [line for line in card.splitlines() if line.startswith("2 tensors of the original checkpoint")]
    assert not [char for before, char in zip(" " + line, line, strict=False) if char in "`*[]<>" and before != "\\"]


def test_a_model_of_another_class_is_loaded_by_it():
    card = model_card(encoders.tiny("bert_classifier"), packed=True)
    assert (
        "from transformers import BertForSequenceClassification\n" in card and "Causal" not in card and "pipeline_tag" not in card
    )
    assert "AutoModelForCausalLM.from_pretrained" in model_card(tiny.llama()) and "text-generation" in model_card(tiny.llama())


def test_what_stands_in_it():
    card = model_card(tiny.llama(), packed=True, command="sparsekern prune it", results={"zeros": "50.00%"}, settings={"seed": 0})
    assert card.startswith("---\nlibrary_name: transformers\n") and "import sparsekern" in card
    assert "```\nsparsekern prune it\n```" in card and "| zeros | 50.00% |" in card and "| seed | 0 |" in card
    assert all(f"| {name} | {version} |" in card for name, version in versions().items())


LICENSE = "---\nlicense: other\nlicense_name: bananas\nlicense_link: LICENSE\nlanguage: [en, de]\ntags: [fruit]\nbase_model: a/b\n---\n# It\n"
TAKEN_OVER = {"license": "other", "license_name": "bananas", "license_link": "LICENSE", "language": ["en", "de"]}


def data_of(model, **options) -> dict:
    return ModelCard(model_card(model, **options)).data.to_dict()


def from_folder(folder: Path, name: str):
    model = tiny.llama()
    model.sparsekern_source = Source(folder, name)
    return model


def test_a_model_of_the_hub_is_the_base_and_gives_its_license(tmp_path):
    folder = tmp_path / "models--ann--big" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(LICENSE)
    data = data_of(from_folder(folder, "ann/big"), settings={"pattern": "2:4"})
    expected = {"base_model": "ann/big", "base_model_relation": "finetune", "tags": ["sparsekern", "pruned", "sparse", "2:4"]}
    assert data == {**TAKEN_OVER, **expected, "library_name": "transformers", "pipeline_tag": "text-generation"}


def test_a_model_that_another_program_loaded_from_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(LICENSE)
    found = {("ann/big", "README.md"): str(tmp_path / "README.md")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *name: found.get(name))
    model = tiny.llama()
    model.config._name_or_path = "ann/big"
    assert data_of(model)["license"] == "other" and data_of(model)["base_model"] == "ann/big"
    model.config._name_or_path = "ann/other"
    assert "license" not in data_of(model) and data_of(model)["base_model"] == "ann/other"


def test_a_folder_names_a_base_only_if_sparsekern_wrote_it(tmp_path):
    (tmp_path / "README.md").write_text(LICENSE)
    data = data_of(from_folder(tmp_path, str(tmp_path)))
    assert "base_model" not in data and TAKEN_OVER.items() <= data.items()
    (tmp_path / "README.md").write_text(LICENSE.replace("fruit", "sparsekern"))
    assert data_of(from_folder(tmp_path, str(tmp_path)))["base_model"] == "a/b"


def test_a_model_that_is_packed_later_keeps_its_base(tmp_path):
    folder = tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(LICENSE)
    model = from_folder(folder, "ann/big")
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    sparsekern.save(model, tmp_path / "dense")
    sparsekern.save(sparsekern.load(tmp_path / "dense"), tmp_path / "packed", format="packed")
    data = ModelCard.load(tmp_path / "packed" / "README.md").data.to_dict()
    assert data["base_model"] == "ann/big" and TAKEN_OVER.items() <= data.items()


@pytest.mark.parametrize(
    "text", ["---\n- a list\n---\n", "---\n: : :\n\t---\n", "no front matter", "---\ntags: 3\n---\n", "\xff\xfe"]
)
def test_a_card_that_is_not_one_is_left_alone(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))
    assert "license" not in data_of(from_folder(tmp_path, str(tmp_path)))


def test_the_builtin_model_has_a_base(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "builtin_gguf", lambda: tmp_path / "model.gguf")
    model = tiny.llama()
    model.config._name_or_path = str(tmp_path)
    assert data_of(model)["base_model"] == loading.BUILTIN_BASE and data_of(model)["license"] == "apache-2.0"


def test_results_become_evaluation_results():
    results = {
        "perplexity, dense": 8.0,
        "perplexity, pruned": 9.5,
        "evaluated on": "a text",
        "task arc, acc": 0.25,
        "weights": "1 MB",
    }
    found = ModelCard(model_card(tiny.llama(), results=results)).data.eval_results
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in found] == [
        ("a text", "perplexity", 9.5),
        ("arc", "acc", 0.25),
    ]


@pytest.mark.parametrize("before", [None, {"zeros": "50.00%", "task arc, acc": 0.5}])
def test_later_results_are_added_or_replaced(before):
    card = model_card(tiny.llama(), results=before, settings={"seed": 0})
    text = with_results(card, {"task arc, acc": 0.25, "note": "a | b"})
    rows_before = [row for row in rows(card) if "arc" not in row]
    assert sorted(rows(text)) == sorted([*rows_before, "| task arc, acc | 0.25 |", "| note | a \\| b |"])
    assert text.count("## Results") == 1 and text.index("## Results") < text.index("## Settings")
    (found,) = ModelCard(text).data.eval_results
    assert found.metric_value == 0.25
    assert with_results(text, {"note": "a | b"}) == text
