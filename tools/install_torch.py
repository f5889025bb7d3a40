"""Install torch into the environment of the Python that runs this: `python tools/install_torch.py [PIP ARGUMENTS]`.

With arguments, pip gets them as they are. Without: with an NVIDIA GPU, torch as pip finds it; with none, a CPU build. pip is
asked first what it would install; only where that would be gigabytes of CUDA packages, uv fetches the CPU build, since it knows
where PyTorch keeps those.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

CPU_TORCH = "torch==2.13.0"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]


def main(arguments: list[str]) -> None:
    if arguments:
        run([*PIP, *arguments])
    elif has_nvidia_gpu():
        run([*PIP, "torch"])
    elif not pip_would_fetch_cuda():
        run([*PIP, CPU_TORCH])
    else:
        install_cpu_build()


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    return bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def pip_would_fetch_cuda() -> bool:
    told = subprocess.run([*PIP, "--dry-run", "--quiet", "--report", "-", CPU_TORCH], capture_output=True, text=True)
    if told.returncode != 0:
        return False  # pip itself says why when it is asked to install
    names = [package["metadata"]["name"].lower() for package in json.loads(told.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def install_cpu_build() -> None:
    run([*PIP, "--quiet", "uv"])
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend", "cpu", CPU_TORCH]
    if subprocess.run(uv).returncode != 0:
        print("no CPU build of torch is to be had here: installing the CUDA build, gigabytes of it", file=sys.stderr)
        run([*PIP, CPU_TORCH])


def run(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode != 0:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
