"""The direction of imports, and what `import sparsekern` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "sparsekern"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each part may import those of the rows below its own, and itself: not its neighbours.
LAYERS = [
    {"", "__main__"},
    {"cli"},
    {"conversion"},
    {"pruning", "measure", "serving", "export"},
    {"reports"},
    {"runtime", "training", "data", "methods", "_info"},
    {"models"},
    {"ranks"},
    {"ops"},
    {"backends"},
    {"triton_kernels", "_C", "_C_cuda"},
    {"layouts", "pattern", "_activations", "_checks", "_files"},
    {"_warnings", "_version", "_counts"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
BEHIND_TRANSFORMERS = "runtime/hf_quantizer.py"  # classes of its; imported, inside functions only, once it is
WITHOUT_TRANSFORMERS = {"methods", "ops", "backends", "triton_kernels", "pattern", "layouts", "_warnings"}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports_of(path: Path):
    """Every import as (absolute module name, whether it is inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
        for node in ast.walk(branch)
    }
    package = ("sparsekern", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        inside = id(node) in lazy or id(node) in typing_only
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *((node.module,) if node.module else ())))
            if name == "sparsekern":  # `from .. import ops, __version__`
                yield from ((f"sparsekern.{alias.name}" if alias.name in RANK else name, inside) for alias in node.names)
            else:
                yield name, inside


def test_every_part_has_its_place():
    assert {part_of(path) for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = part_of(path)
    for name, _ in imports_of(path):
        parts = name.split(".")
        if parts[0] == "sparsekern" and len(parts) > 1:
            assert own == parts[1] or RANK[own] < RANK[parts[1]], f"{own} imports {name}, which does not stand below it"


def module_of(path: Path) -> str:
    parts = ("sparsekern", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_of(path): path for path in MODULES}


def names_taken(path: Path):
    """Every name that a module imports from the package, as (module that it is taken from, name)."""
    package = ("sparsekern", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            source = ".".join((*base, *((node.module,) if node.module else ())))
            yield from ((source, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_crosses_a_folder(path):
    """Files of the package's own folder, such as `_version`, serve everyone."""
    folder = module_of(path.parent / "__init__.py")
    for source, name in names_taken(path):
        whole = f"{source}.{name}" if f"{source}.{name}" in NAMES else source
        of = whole.rpartition(".")[0]
        if of not in (folder, "sparsekern") and source != folder:
            private = [part for part in (whole.rpartition(".")[2], name) if part.startswith("_") and not part.endswith("__")]
            assert not private, f"{module_of(path)} imports {name} of {source}"


def test_there_is_no_circle_of_imports():
    """Counting those inside functions, too. What a package's `__init__` imports of its own folder is no circle."""
    imports: dict[str, set[str]] = {}
    for module, path in NAMES.items():
        taken = {f"{source}.{name}" if f"{source}.{name}" in NAMES else source for source, name in names_taken(path)}
        imports[module] = {name for name in taken & NAMES.keys() if not module.startswith(f"{name}.") and name != "sparsekern"}
    while imports:
        free = [module for module, needed in imports.items() if not needed & imports.keys()]
        assert free, f"these import each other: {', '.join(sorted(imports))}"
        for module in free:
            del imports[module]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_transformers_is_imported_late_and_not_below_the_pipeline(path):
    if path == PACKAGE / BEHIND_TRANSFORMERS:
        return
    for name, inside in imports_of(path):
        assert inside or not name.endswith("quantizer"), "what needs transformers is imported with the package"
        if name.split(".")[0] in ("transformers", "datasets", "pyarrow", "gguf"):
            assert inside, f"{name} is imported with the package"
            assert part_of(path) not in WITHOUT_TRANSFORMERS, f"{name} below the pipeline"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return done.stdout.strip()


def test_import_takes_no_cuda_context():
    assert run("import torch, sparsekern; print(torch.cuda.is_initialized())") == "False"


# Parts of torch that `import torch` leaves out because each takes longer than all of sparsekern.
HEAVY_PARTS_OF_TORCH = ("torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.cpp_extension")


def test_import_loads_nothing_but_the_package_and_the_standard_library():
    """The cost of `import sparsekern` beyond torch, as the list of what is loaded: the same on a slow machine and on a busy one."""
    loaded = run(
        "import sys, torch; before = set(sys.modules); import sparsekern; print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "sparsekern.ops.gram" in loaded
    expected = {"sparsekern", "torch", *sys.stdlib_module_names}
    assert [name for name in loaded if name.partition(".")[0] not in expected or name.startswith(HEAVY_PARTS_OF_TORCH)] == []


def test_import_builds_no_large_tables():
    """Importing makes some 17,000 function calls on Python 3.11; a table of 100,000 entries that is built in a loop makes more."""
    counted = run(
        "import sys, torch\n"
        "calls = []\n"
        "sys.setprofile(lambda frame, event, argument: event == 'call' and calls.append(frame.f_code.co_filename))\n"
        "import sparsekern\n"
        "sys.setprofile(None)\n"
        "print(len(calls))"
    )
    assert 100 < int(counted) < 100_000
