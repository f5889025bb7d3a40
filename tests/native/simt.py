"""Builds the CUDA kernels for this CPU: the .cu files and their wrappers as they are, csrc/testing/simt for the CUDA runtime."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from .sanitizers import BUILD, ROOT, compiler

CSRC = ROOT / "csrc"
FLAGS = [
    *("-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-DSPARSEKERN_SIMT", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-variable", "-Wno-unused-function", "-Wno-psabi"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
]


def build_library(kernels: Path = CSRC / "cuda", build: Path = BUILD / "simt") -> Path:
    """A library of the raw ops of `kernels` for CPU tensors. Only what has changed is compiled.

    Raises:
        RuntimeError: with the compiler's words, if something does not compile.
    """
    build.mkdir(parents=True, exist_ok=True)
    include = [f"-I{folder}" for folder in (kernels.parent, CSRC, CSRC / "testing", CSRC / "testing" / "simt", *include_paths())]
    sources = sorted([*kernels.glob("*.cu"), *kernels.glob("*_op.cpp")])
    headers = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *kernels.rglob("*.h"), Path(__file__)]
    newest = max(header.stat().st_mtime for header in headers)

    def compile_one(source: Path) -> Path:
        target = build / f"{source.name}-{torch.__version__}.o"
        if not target.exists() or target.stat().st_mtime <= max(newest, source.stat().st_mtime):
            _run(*compiler(), *FLAGS, *include, "-c", "-x", "c++", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = build / "_C_simt.so"
    link = [f"-L{folder}" for folder in library_paths()]
    _run(*compiler(), "-shared", "-fsanitize=address,undefined", *objects, *link, "-ltorch_cpu", "-o", library)
    return library


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
