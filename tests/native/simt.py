"""Builds the CUDA kernels for this CPU: the .cu files and their wrappers as they are, csrc/testing/simt for the CUDA runtime."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from .sanitizers import BUILD, ROOT, compiler

CSRC = ROOT / "csrc"
FLAGS = [
    *(
        "-std=c++17",
        "-O1",
        "-g1",  # lines for the sanitizers, no variables: a quarter of the compile time
        "-fPIC",
        "-fno-omit-frame-pointer",
        "-DSPARSEKERN_SIMT",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-function", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
]
INCLUDE = [f"-I{folder}" for folder in (CSRC, CSRC / "testing", CSRC / "testing" / "simt", *include_paths())]


def build_library(library: Path = BUILD / "simt" / "_C_simt.so", instead: Mapping[str, Path] = MappingProxyType({})) -> Path:
    """A library of the raw ops for CPU tensors. Only what has changed is compiled.

    Args:
        library: the file to make.
        instead: kernels to take in place of those of the same name in csrc/cuda, compiled beside themselves.

    Raises:
        RuntimeError: with the compiler's words, if something does not compile.
    """
    objects = BUILD / "simt"
    objects.mkdir(parents=True, exist_ok=True)
    cuda = CSRC / "cuda"
    wrappers = objects / "ops.cpp"  # in one unit, as setup.py compiles them
    text = "".join(f'#include "cuda/{source.name}"\n' for source in sorted(cuda.glob("*_op.cpp")))
    if not wrappers.exists() or wrappers.read_text() != text:
        wrappers.write_text(text)
    sources = [wrappers, *(instead.get(source.name, source) for source in sorted(cuda.glob("*.cu")))]
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *cuda.glob("*_op.cpp"), Path(__file__)]
    newest = max(header.stat().st_mtime for header in headers)

    def compile_one(source: Path) -> Path:
        target = (source.parent if source in instead.values() else objects) / f"{source.name}-{torch.__version__}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            _run(*compiler(), *FLAGS, *INCLUDE, "-c", "-x", "c++", source, "-o", target)
        return target

    with _one_process_at_a_time(objects), ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(compile_one, sources))
        if not library.exists() or library.stat().st_mtime < max(file.stat().st_mtime for file in compiled):
            link = [f"-L{folder}" for folder in library_paths()]
            _run(*compiler(), "-shared", "-fsanitize=address,undefined", *compiled, *link, "-ltorch_cpu", "-o", library)
    return library


@contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
