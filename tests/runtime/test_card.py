"""The model card: what it shows, and that nothing in it is read as markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsekern.models.source import Source
from sparsekern.runtime import model_card, versions
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
