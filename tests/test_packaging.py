"""What is built and shipped: symbols, architectures, the wheel, and an install without a compiler."""

import importlib.util
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparsekern.backends.libraries import LIBRARIES

ROOT = Path(__file__).resolve().parent.parent
NATIVE, CUDA = (
    Path(spec.origin) if spec else None for spec in map(importlib.util.find_spec, ("sparsekern._C", "sparsekern._C_cuda"))
)
LIBRARY_FILES = {"_C": NATIVE, "_C_cuda": CUDA}

PYTHON_SYMBOLS = {"PyModule_Create2", "PyUnicode_FromString", "PyErr_SetString", "PyExc_ValueError"}  # all in the limited API
RUNTIME_VERSIONS = r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+$"
WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def built(name: str) -> Path:
    if LIBRARY_FILES[name] is None:
        pytest.skip(f"{name} was not built here: {LIBRARIES[name].reason}")
    return LIBRARY_FILES[name]


def needs(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not installed")
    return path


def outside_symbols(library: Path) -> list[str]:
    """Undefined symbols that are neither the C and C++ runtimes' nor libgcc's."""
    told = subprocess.run([needs("nm"), "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in told.splitlines()]
    return [symbol for symbol in symbols if not re.search(RUNTIME_VERSIONS, symbol) and symbol not in WEAK]


@pytest.mark.parametrize("name", LIBRARY_FILES)
def test_only_the_stable_abi_and_the_limited_api_are_called(name):
    symbols = outside_symbols(built(name))
    assert "torch_call_dispatcher" in symbols
    unexpected = [s for s in symbols if not s.startswith(("aoti_torch_", "torch_")) and s not in PYTHON_SYMBOLS]
    # This catches at:: and c10:: (mangled _ZN2at…, _ZN3c10…) as well as anything newer than the limited API of Python 3.10.
    assert not unexpected


def test_no_library_is_asked_for_that_a_cpu_torch_lacks():
    told = subprocess.run([needs("readelf"), "-d", built("_C_cuda")], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", told)
    assert "libtorch.so" in needed  # which brings the CUDA half along where torch has one
    assert not [name for name in needed if "cuda" in name]


def test_both_gpu_architectures_are_in():
    """Reads the fat binaries: entries of kind 2 are machine code, kind 1 is PTX, which later GPUs compile for themselves."""
    image, found = built("_C_cuda").read_bytes(), set()
    for match in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), image):
        (size,) = struct.unpack_from("<Q", image, match.start() + 8)
        at, end = match.start() + 16, match.start() + 16 + size
        while at < end:
            kind, _, header, length = struct.unpack_from("<HHIQ", image, at)
            found.add((kind, struct.unpack_from("<I", image, at + 28)[0]))
            at += header + length
    assert {(2, 80), (2, 90), (1, 90)} <= found


def test_cuda_is_built_where_nvcc_is():
    if os.environ.get("SPARSEKERN_CUDA") == "0" or LIBRARY_FILES["_C"] is None:
        pytest.skip("the build was asked to leave CUDA out")
    needs("nvcc")
    assert CUDA is not None, "nvcc is here, but _C_cuda was not built"


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 150


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git would hand out, so that nothing is built into the working tree."""
    copy = tmp_path_factory.mktemp("source") / "sparsekern"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("sparsekern", "csrc", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


def install(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run(
        [*command, "--target", target, source],
        capture_output=True,
        text=True,
        env=os.environ | {"SPARSEKERN_CUDA": "0"} | environment,
    )


PRUNE = """
import sys, torch
# An editable install of the checkout would fill in for what the tested one lacks.
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import sparsekern, sparsekern.ops
assert sparsekern.__file__.startswith(sys.argv[1]), sparsekern.__file__
weight, x = torch.randn(8, 16), torch.randn(64, 16)
gram = sparsekern.ops.gram_symmetrize_(sparsekern.ops.gram_(torch.zeros(16, 16), x))
pruned, mask, error = sparsekern.ops.obs_sweep(weight, sparsekern.ops.reverse_cholesky(gram), pattern="2:4")
assert (mask.unflatten(1, (4, 4)).sum(-1) == 2).all() and (pruned[~mask] == 0).all()
print(sparsekern.info().libraries["_C"])
"""


def use(target: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRUNE, str(target)],
        cwd=target,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("environment", [{"SPARSEKERN_BUILD": "0"}, {"CXX": "no-such-compiler"}], ids=["asked for", "no compiler"])
def test_without_native_code_the_references_run(source, tmp_path, environment):
    done = install(source, tmp_path / "site", **environment)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "site").rglob("*.so"))
    assert use(tmp_path / "site") == "not built (SPARSEKERN_BUILD=0, or no compiler when it was installed)"


def setup_py(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=source, env=os.environ | environment, capture_output=True, text=True
    )


def test_a_missing_compiler_is_a_warning_and_an_error_where_it_was_asked_for(source):
    warned = setup_py(source, "--version", CXX="no-such-compiler")
    assert warned.returncode == 0
    assert "warning: sparsekern: the C++ compiler 'no-such-compiler' was not found; installing without native" in warned.stderr
    refused = setup_py(source, "--version", CXX="no-such-compiler", SPARSEKERN_BUILD="1")
    assert refused.returncode != 0 and "SPARSEKERN_BUILD=1: the C++ compiler 'no-such-compiler' was not found" in refused.stderr


def test_a_missing_nvcc_is_an_error_where_it_was_asked_for(source):
    refused = setup_py(source, "--version", SPARSEKERN_CUDA="1", CUDA_HOME="/nonexistent")
    assert refused.returncode != 0 and "SPARSEKERN_CUDA=1: nvcc was not found" in refused.stderr


@pytest.mark.parametrize("name", ["SPARSEKERN_BUILD", "SPARSEKERN_CUDA", "DEBUG"])
def test_settings_of_the_build_are_checked(source, name):
    refused = setup_py(source, "--version", **{name: "maybe"})
    assert refused.returncode != 0 and re.search(rf"{name}: expected one of .*, got 'maybe'", refused.stderr)


@pytest.mark.parametrize("hook", ["wheel", "editable"])
def test_torch_is_asked_for_only_to_build_native_code(hook):
    program = f"import build_backend; print(build_backend.get_requires_for_build_{hook}())"
    for environment, expected in (({"SPARSEKERN_BUILD": "0"}, False), ({"SPARSEKERN_BUILD": "auto"}, True)):
        environment = os.environ | environment | {"PYTHONPATH": str(ROOT / "tools")}
        told = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert ("torch" in told.stdout.splitlines()[-1]) is expected
        assert ("numpy" in told.stdout.splitlines()[-1]) is expected  # without it, importing torch is a warning in each build


def test_an_editable_install_says_nothing(source, tmp_path):
    program = f"import build_backend; build_backend.build_editable({str(tmp_path)!r})"
    environment = os.environ | {"SPARSEKERN_BUILD": "0", "PYTHONPATH": str(source / "tools")}
    done = subprocess.run([sys.executable, "-c", program], cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and list(tmp_path.glob("*.whl"))
    assert "Warning" not in done.stderr  # pip shows warnings even when it is quiet


def test_pre_commit_runs_the_versions_that_make_lint_installs():
    told = subprocess.run([sys.executable, "tools/extra.py", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    used = re.findall(r'additional_dependencies: \["([^"]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(used) == set(told.split())


def test_a_source_that_does_not_compile_is_an_error_and_not_a_slow_package(source, tmp_path):
    needs("c++")
    broken = shutil.copytree(source, tmp_path / "broken")
    for file in (broken / "csrc" / "cpu").glob("*.cpp"):
        file.unlink()
    (broken / "csrc" / "cpu" / "isa.cpp").write_text("this is no C++")
    assert install(broken, tmp_path / "nothing").returncode != 0


@pytest.mark.slow
def test_the_wheel_serves_every_python(source, tmp_path):
    """The compiler hands out the library that was built here, from the same sources by the same setup.py."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && cp {shlex.quote(str(built("_C")))} "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    environment = {"SPARSEKERN_CUDA": "0", "CXX": str(compiler), "CC": str(compiler), "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    folder = shutil.copytree(source, tmp_path / "source")

    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path]
    subprocess.run([*command, folder], check=True, capture_output=True, env=os.environ | environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"sparsekern-[0-9.]+-cp310-abi3-\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".so")] == ["sparsekern/_C.so"]
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert use(tmp_path / "site") == "loaded"
