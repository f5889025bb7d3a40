"""The documentation: its programs run, its generated pages are those of the code, and the messages that it explains exist."""

import importlib.util
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import sparsekern
from sparsekern import ops
from sparsekern.cli.main import INTERRUPTED, main
from tests import encoders, tiny

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
PROGRAMS = {
    page: "".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)) for page in PAGES
}
GENERATED = {"models.md", "ops.md", "methods.md", "cli.md", "api.md"}
RUN = sorted(page for page, program in PROGRAMS.items() if program and page not in GENERATED)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the model, the encoder and the pruned folder that the pages speak of."""
    tiny.save_folder(tmp_path / "model")
    encoders.save_folder(tmp_path / "encoder")
    tiny.save_mixture(tmp_path / "mixture")
    sparsekern.prune(model := tiny.llama(), "magnitude", 0.5, progress=False)
    sparsekern.save(model, tmp_path / "pruned")
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def shortened(program: str) -> str:
    program = (
        program.replace("path/or/hub-id", "model")
        .replace("path/to/model", "model")
        .replace("path/to/encoder", "encoder")
        .replace("path/to/mixture", "mixture")
        .replace('"builtin:python-docs"', '"text.txt"')
    )
    program = program.replace("experts=16", "experts=12")  # of the tiny model's 48 neurons
    program = program.replace(', out="pruned"', ', out="pruned-here"')
    return program.replace("tokenizer=tokenizer", "tokenizer=tokenizer, samples=4, length=16")


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
@pytest.mark.parametrize("page", RUN)
def test_programs_run(page, workplace):
    names: dict = {"model": tiny.llama(), "ids": sparsekern_ids()}
    exec(shortened(PROGRAMS[page]), names)


COMMANDS = re.findall(r"^(?:sparsekern|torchrun) .*$", (DOCS / "large-models.md").read_text(encoding="utf-8"), re.MULTILINE)
SMALL = {"prune": "--samples 4 --length 16", "eval": "--text text.txt --windows 2 --length 16"}


def small(command: str) -> list[str]:
    """Return the words of a command for the tiny models of this test."""
    command = command.replace("path/to/", "").replace("--nproc-per-node=8", "--nproc-per-node=2")
    kind = "prune" if "sparsekern prune" in command else "eval"
    text = "" if "--calibration" in command or kind == "eval" else "--calibration text.txt"
    return shlex.split(f"{command} {SMALL[kind]} {text} --device cpu")


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
def test_commands_for_large_models_run(workplace, monkeypatch):
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(tiny.TEXT, encoding="utf-8")
    shutil.rmtree("pruned")
    for command in map(small, COMMANDS):
        out = Path(command[command.index("--out") + 1]) if "--out" in command else None
        if out and "--resume" in command:
            shutil.rmtree(out)
            interrupted([word for word in command if word != "--resume"], monkeypatch)
            assert len(list(out.glob("checkpoint/*.safetensors"))) == 1
        assert main(own_words(command)) == 0
        assert out is None or (out / "report.json").is_file()
    assert any("--resume" in command for command in COMMANDS) and any("torchrun" in command for command in COMMANDS)


def own_words(command: list[str]) -> list[str]:
    """Return the arguments of `sparsekern` in a command. What torchrun makes of its own is tested in tests/ranks/test_torchrun.py."""
    if command[0] != "torchrun":
        return command[1:]
    options = get_args_parser().parse_args(command[1:])
    assert (options.module, options.training_script) == (True, "sparsekern")
    return options.training_script_args


def interrupted(command: list[str], monkeypatch) -> None:
    """Run a command whose user presses Ctrl-C while the second block is solved."""
    solve, calls = sparsekern.SparseGPT.solve, []

    def stopped(self, *arguments):
        calls.append(1)
        if len(calls) == 10:  # of the seven linears of a block
            raise KeyboardInterrupt
        return solve(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(sparsekern.SparseGPT, "solve", stopped)
        assert main(command[1:]) == INTERRUPTED


def sparsekern_ids():
    import torch

    return torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", sorted(GENERATED))
def test_generated_pages_are_current(page):
    expected = generator().PAGES[page]()
    assert (DOCS / page).read_text(encoding="utf-8") == expected, "python docs/generate.py writes them"


def test_messages_that_are_explained_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [first for first in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)]
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sparsekern").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # a message over several lines of code is one
    assert len(messages) > 25
    assert [message for message in messages if message not in joined] == []


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^([\w-]+)$", index, re.MULTILINE))
    linked = set(re.findall(r"\]\(([\w-]+)\.md\)", (DOCS / "benchmarks.md").read_text(encoding="utf-8")))
    assert {page.removesuffix(".md") for page in PAGES} - {"index"} <= listed | linked


@pytest.mark.parametrize(
    "name", [f"sparsekern.{name}" for name in sparsekern.__all__] + [f"sparsekern.ops.{name}" for name in ops.__all__]
)
def test_the_docstring_describes_every_argument(name):
    thing = getattr(ops if name.startswith("sparsekern.ops.") else sparsekern, name.rpartition(".")[2])
    functions = vars(thing).values() if inspect.isclass(thing) else [thing]
    for function in filter(inspect.isfunction, functions):
        section = re.search(r"^Args:\n((?: {4}.*\n|\n)*)", (inspect.getdoc(function) or "") + "\n", re.MULTILINE)
        if section:
            arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
            assert re.findall(r"^ {4}(\w+): ", section[1], re.MULTILINE) == arguments, function.__qualname__
