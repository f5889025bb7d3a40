"""Check families of the zoo, and write the rows of those that are right to docs/families.json.

`python -m tests.models.zoo` checks all, `python -m tests.models.zoo mixtral t5` these. A family that is not right loses its row, and
the program then ends with 1. `python docs/generate.py` makes the page from the rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

import transformers

from . import ZOO
from .checks import check_family
from .table import FILE, read_rows, written


def main(names: list[str]) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows, wrong = read_rows(), 0
    for name in names or ZOO:
        rows.pop(name, None)
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows[name] = check_family(ZOO[name], Path(folder))
            except Exception as error:
                wrong += 1
                print(f"{name}: {type(error).__name__}: {error}")
                if names:
                    traceback.print_exc()
            else:
                print(f"{name}: {json.dumps(rows[name])}")
    FILE.write_text(written(rows), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
