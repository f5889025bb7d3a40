"""Front matter of model cards: what the Hugging Face hub lists and filters models by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models.load import BUILTIN_BASE, BUILTIN_LICENSE, is_builtin
from ..models.source import source_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
SNAPSHOTS = "snapshots"  # the folder of the hub's cache that holds those of the models
TAG = "sparsekern"
DERIVED = "finetune"  # of the four relations that the hub knows, the one for other weights in the same shapes
TAKEN_OVER = ("license", "license_name", "license_link", "language")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TASK = re.compile(r"task (?P<task>[^,]+), (?P<metric>[^,]+)")  # how `tasks` names its measurements
PERPLEXITY, EVALUATED = "perplexity, pruned", "evaluated on"


def front_matter(
    model: torch.nn.Module, *, pipeline: str | None, sparse: bool, results: Mapping[str, object], settings: Mapping[str, object]
) -> str:
    """Return the front matter of a model card, without the lines around it.

    The base model, its license and its language are those of the folder or hub id that the model was loaded from, as far as they
    are known there.

    Args:
        model: the pruned model.
        pipeline: what the hub runs the model for, or None.
        sparse: whether weights are zero, not only removed.
        results: measurements by name. The perplexity, and the metrics of tasks, become evaluation results.
        settings: settings of the run by name, of which `pattern` becomes a tag if it is N:M.
    """
    from huggingface_hub import ModelCardData

    base, known = base_of(model)
    pattern = str(settings.get("pattern", ""))
    tags = [TAG, "pruned", *(["sparse"] if sparse else []), *([pattern] if re.fullmatch(r"\d+:\d+", pattern) else [])]
    evaluations = eval_results(results)
    data = ModelCardData(
        base_model=base,
        base_model_relation=DERIVED if base else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=tags,
        eval_results=evaluations or None,
        model_name=f"{(base or type(model).__name__).rpartition('/')[2]}-pruned" if evaluations else None,
        **known,
    )
    return data.to_yaml()


def base_of(model: torch.nn.Module) -> tuple[str | None, dict[str, Any]]:
    """Return the hub id of the model that this one was made from, None if it is not known, and the entries of its card to take over.

    A folder that sparsekern wrote names its own base model, so a model that is pruned or packed again keeps it.
    """
    source = source_of(model)
    name = source.name if source else str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    if is_builtin(name):
        return BUILTIN_BASE, {"license": BUILTIN_LICENSE}
    of_hub = HUB_ID.fullmatch(name) and (source.folder.parent.name == SNAPSHOTS if source else not Path(name).exists())
    card = _card_of(source.folder if source else _cached(name) if of_hub else Path(name))
    known = {entry: card[entry] for entry in TAKEN_OVER if card.get(entry)}
    own = TAG in (card.get("tags") or ())
    return (name if of_hub else card.get("base_model") if own else None), known


def eval_results(results: Mapping[str, object]) -> list[EvalResult]:
    """Return the evaluation results among the measurements of a run."""
    from huggingface_hub import EvalResult

    found = []
    for name, value in results.items():
        match = TASK.fullmatch(name)
        if not isinstance(value, float) or not (match or name == PERPLEXITY):
            continue
        dataset = match["task"] if match else str(results.get(EVALUATED, "a held-out text"))
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=match["task"] if match else "text",
                dataset_name=dataset,
                metric_type=match["metric"] if match else "perplexity",
                metric_value=value,
            )
        )
    return found


def add_evaluations(card: str, results: Mapping[str, object]) -> str:
    """Return the text of a model card with the evaluation results among these measurements.

    One of the same data and metric is replaced.

    Raises:
        ValueError: the front matter is not that of a card.
    """
    from huggingface_hub import ModelCard

    added = eval_results(results)
    if not added:
        return card
    parsed = ModelCard(card)
    data: Any = parsed.data  # the base class of cards lacks these entries
    replaced = {(found.dataset_name, found.metric_type) for found in added}
    kept = [found for found in data.eval_results or () if (found.dataset_name, found.metric_type) not in replaced]
    data.eval_results = [*kept, *added]
    data.model_name = data.model_name or "pruned"
    return str(parsed.content)


def _cached(name: str) -> Path:
    """Return the folder of a hub id in the hub's cache, or one without a card."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CARD)
    return Path(found).parent if isinstance(found, str) else Path()


def _card_of(folder: Path) -> Mapping[str, Any]:
    """Return the front matter of the card in a folder, or nothing if it has none that can be read."""
    import yaml
    from huggingface_hub import ModelCard

    if folder == Path() or not (folder / CARD).is_file():
        return {}
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        if not text.lstrip("\ufeff\n ").startswith("---"):  # the hub's reader would warn
            return {}
        found: dict[str, Any] = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # a card is for people, and this one is not written as the hub has it
        return {}
    return found
