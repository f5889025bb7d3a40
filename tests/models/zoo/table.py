"""The rows of the table of families in the documentation, a line a family."""

from __future__ import annotations

import json
from pathlib import Path

from . import ZOO

FILE = Path(__file__).resolve().parents[3] / "docs" / "families.json"


def read_rows() -> dict[str, dict[str, object]]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def written(rows: dict[str, dict[str, object]]) -> str:
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in ZOO if name in rows]
    return "{\n" + ",\n".join(lines) + "\n}\n"
