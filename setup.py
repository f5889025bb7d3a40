"""Builds `sparsekern._C` (CPU kernels) and `sparsekern._C_cuda`; everything else about the package is in pyproject.toml.

Environment:
  SPARSEKERN_BUILD     auto (default) | 0 | 1    auto builds where a C++ compiler is found and warns where none is; 0 installs
                                                 without native code (every op runs its PyTorch reference); 1 must find a compiler.
  SPARSEKERN_CUDA      auto (default) | 0 | 1    auto builds the CUDA library where nvcc is found; 1 makes a missing nvcc an error.
  TORCH_CUDA_ARCH_LIST as in PyTorch             default "8.0;9.0+PTX".
  MAX_JOBS             as in PyTorch             compiler processes at once.
  DEBUG                0 (default) | 1 | asan    1: -O0 -g; asan: AddressSanitizer and UndefinedBehaviorSanitizer.
No decision looks at whether a GPU is present: a wheel built on a CPU machine is the wheel for a GPU machine.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = "0x020a000000000000"  # 2.10, the first release with a stable parallel_for
ABI_FLAGS = [f"-DTORCH_TARGET_VERSION={MINIMUM_TORCH}", "-DPy_LIMITED_API=0x030A0000"]


def environment_choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def compile_flags() -> tuple[list[str], list[str]]:
    common = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Werror=return-type"]
    debug = environment_choice("DEBUG", ("0", "1", "asan"))
    if debug == "1":
        return [*common, "-O0", "-g"], []
    if debug == "asan":
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        left_out = ["-DSPARSEKERN_WITHOUT_AVX512"] if lacks_avx512() else []  # a third of the build, and no test could run it here
        # Python's own flags hold -fwrapv, which would hide overflows.
        return [*common, "-O1", "-g1", "-fno-wrapv", *sanitizers, *left_out], sanitizers
    return [*common, "-O3", "-g0"], []


def lacks_avx512() -> bool:
    """Whether this machine says that its CPU has no AVX-512."""
    told = Path("/proc/cpuinfo")
    return told.exists() and "avx512" not in told.read_text()


def sources(folder: str, *suffixes: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).iterdir() if p.name.endswith(suffixes))


def kernels(folder: str, *suffixes: str) -> list[str]:
    """The sources of a folder, its wrappers as one: each of them spends seconds on torch's headers and none on itself."""
    wrappers, unit = sources(folder, "_op.cpp"), ROOT / "build" / f"{folder}_ops.cpp"
    text = "".join(f'#include "{Path(source).relative_to("csrc").as_posix()}"\n' for source in wrappers)
    if not unit.exists() or unit.read_text() != text:  # or else its date stays, and with it what was compiled
        unit.parent.mkdir(exist_ok=True)
        (draft := unit.with_suffix(f".{os.getpid()}")).write_text(text)
        draft.replace(unit)  # whole, should another build read it
    return [*(source for source in sources(folder, *suffixes) if source not in wrappers), str(unit.relative_to(ROOT))]


def missing_compiler() -> str | None:
    """The first compiler that a build would call and this machine lacks: ours for the sources, Python's own to link."""
    commands = (os.environ.get("CXX", "c++"), os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return next((command for command in commands if not shutil.which(shlex.split(command)[0])), None)


def extensions() -> tuple[list, dict]:
    build = environment_choice("SPARSEKERN_BUILD", ("auto", "0", "1"))
    if build == "0":
        return [], {}
    if missing := missing_compiler():
        message = f"the C++ compiler '{missing}' was not found"
        if build == "1":
            raise SystemExit(f"SPARSEKERN_BUILD=1: {message}")
        print(f"warning: sparsekern: {message}; installing without native kernels (slow references only)", file=sys.stderr)
        return [], {}
    # torch is imported only when something is built, so that a pure-Python install needs no torch at build time.
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags, link_flags = compile_flags()
    # The sanitized build has a fault planted in it, for the test that shows that a fault is found, and a way to code that hardly runs.
    testing = ["csrc/testing/planted_fault.cpp", "csrc/testing/last_resort.cpp"] if os.environ.get("DEBUG") == "asan" else []
    native = CppExtension(
        "sparsekern._C",
        [*kernels("cpu", ".cpp"), *testing],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*flags, *ABI_FLAGS]},
        extra_link_args=link_flags,
        py_limited_api=True,
    )
    native.libraries = ["torch_cpu"]  # the stable ABI lives here; CppExtension would add c10 and torch, which nothing calls
    cuda = environment_choice("SPARSEKERN_CUDA", ("auto", "0", "1"))
    built = [native]
    if cuda != "0" and os.environ.get("DEBUG") != "asan":
        built += cuda_extension(required=cuda == "1", flags=flags)
    for extension in built:  # a build without ninja compares the dates of these with that of the library
        extension.depends = [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")]
    return built, {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}


def cuda_home() -> str | None:
    """The toolkit's folder as nvcc itself states it: the nvcc on the path may be a wrapper that lies elsewhere."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home if (Path(home) / "bin" / "nvcc").exists() else None
    if not shutil.which("nvcc"):
        return None
    told = subprocess.run(["nvcc", "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else None


def cuda_extension(required: bool, flags: list[str]) -> list:
    from torch.utils import cpp_extension

    home = cuda_home()
    if home is None:
        if required:
            raise SystemExit("SPARSEKERN_CUDA=1: nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        return []
    cpp_extension.CUDA_HOME = home  # torch looks for it only where torch itself has CUDA
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    extension = cpp_extension.CUDAExtension(
        "sparsekern._C_cuda",
        kernels("cuda", ".cpp", ".cu"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={
            "cxx": [*flags, *ABI_FLAGS, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", "-lineinfo", "--threads=2", *ABI_FLAGS, "-DUSE_CUDA"],
        },
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],  # which pulls the CUDA half of torch in at run time
        py_limited_api=True,
    )
    # Nothing here exists only in a CUDA torch, so it links beside a CPU torch too; a static CUDA runtime fits any newer driver.
    extension.libraries = ["torch_cpu", "cudart_static", "rt", "dl", "pthread"]
    return [extension]


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass, options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {})
