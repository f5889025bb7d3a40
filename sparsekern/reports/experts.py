"""Names of experts with a star for their number, so that a mixture is not shown in thousands of lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")  # of a block
NUMBER = re.compile(r"\d+(?=\.[^.]*$)")  # of an expert, at the end of the part before the last
FEW = 8  # layers that differ in their number alone are shown one by one


def starred(names: Iterable[str]) -> dict[str, str]:
    """Return what each name is shown as: with a star for its last number where more than eight names of a block share the rest.

    Args:
        names: names of linears, such as `model.layers.3.mlp.experts.17.down_proj`.
    """
    shown = {name: _without_number(name) for name in names}
    count = Counter(shown.values())
    return {name: star if count[star] > FEW else name for name, star in shown.items()}


def _without_number(name: str) -> str:
    index = INDEX.search(name)
    start = index.end() if index else 0
    return name[:start] + NUMBER.sub("*", name[start:])
