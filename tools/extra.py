"""Print what an optional dependency group of pyproject.toml asks for: `python tools/extra.py lint`. It needs no package."""

import re
import sys
from pathlib import Path


def requirements(group: str) -> list[str]:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(group)} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        sys.exit(f"pyproject.toml has no optional dependencies called {group!r}")
    return re.findall(r'"([^"]+)"', found[1])


if __name__ == "__main__":
    print(*requirements(sys.argv[1]))
