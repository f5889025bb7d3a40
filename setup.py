"""Builds `sparsekern._C` (CPU kernels) and `sparsekern._C_cuda`; everything else about the package is in pyproject.toml.

Environment:
  SPARSEKERN_BUILD     auto (default) | 0        0 installs without native code: every op then runs its PyTorch reference.
  SPARSEKERN_CUDA      auto (default) | 0 | 1    auto builds the CUDA library where nvcc is found; 1 makes a missing nvcc an error.
  TORCH_CUDA_ARCH_LIST as in PyTorch             default "8.0;9.0".
  MAX_JOBS             as in PyTorch             compiler processes at once.
  DEBUG                0 (default) | 1 | asan    1: -O0 -g; asan: AddressSanitizer and UndefinedBehaviorSanitizer.
No decision looks at whether a GPU is present: a wheel built on a CPU machine is the wheel for a GPU machine.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = "0x020a000000000000"  # 2.10, the first release with a stable parallel_for
ABI_FLAGS = [f"-DTORCH_TARGET_VERSION={MINIMUM_TORCH}", "-DPy_LIMITED_API=0x030a0000"]


def environment_choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def compile_flags() -> tuple[list[str], list[str]]:
    common = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Werror=return-type"]
    debug = environment_choice("DEBUG", ("0", "1", "asan"))
    if debug == "1":
        return [*common, "-O0", "-g"], []
    if debug == "asan":
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        return [*common, "-O1", "-g", *sanitizers], sanitizers
    return [*common, "-O3", "-g0"], []


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).iterdir() if p.suffix in suffixes)


def extensions() -> tuple[list, dict]:
    if environment_choice("SPARSEKERN_BUILD", ("auto", "0")) == "0":
        return [], {}
    # torch is imported only when something is built, so that a pure-Python install needs no torch at build time.
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags, link_flags = compile_flags()
    include = [str(ROOT / "csrc")]
    found = [
        CppExtension(
            "sparsekern._C",
            sources("cpu", ".cpp"),
            include_dirs=include,
            extra_compile_args={"cxx": [*flags, *ABI_FLAGS]},
            extra_link_args=link_flags,
            py_limited_api=True,
        )
    ]
    cuda = environment_choice("SPARSEKERN_CUDA", ("auto", "0", "1"))
    if cuda != "0" and os.environ.get("DEBUG") != "asan":
        found += cuda_extension(required=cuda == "1", include=include, flags=flags)
    return found, {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}


def cuda_extension(required: bool, include: list[str], flags: list[str]) -> list:
    if "CUDA_HOME" not in os.environ and shutil.which("nvcc"):
        os.environ["CUDA_HOME"] = str(Path(shutil.which("nvcc")).resolve().parent.parent)
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        if required:
            raise SystemExit("SPARSEKERN_CUDA=1: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    return [
        CUDAExtension(
            "sparsekern._C_cuda",
            sources("cuda", ".cpp", ".cu"),
            include_dirs=include,
            extra_compile_args={
                "cxx": [*flags, *ABI_FLAGS, "-DUSE_CUDA"],
                "nvcc": ["-O3", "-std=c++17", "-lineinfo", "--threads=2", *ABI_FLAGS, "-DUSE_CUDA"],
            },
            py_limited_api=True,
        )
    ]


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
