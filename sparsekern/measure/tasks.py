"""Zero-shot tasks of lm-evaluation-harness: multiple choice, completion and the like, measured on a model in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._checks import on_one_line
from ..models.evaluation import evaluation_mode
from ..models.float32_products import float32_products
from ..models.streaming import stream_of

PACKAGES = ("lm_eval", "accelerate")
STDERR = "_stderr"
UNFILTERED = "none"


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric: name of the metric, with the filter of the answers if there is one.
        value: its value.
        error: its standard error, None if it is not known.
    """

    task: str
    metric: str
    value: float
    error: float | None

    @property
    def name(self) -> str:
        """Name of the measurement in reports, from which a model card makes an evaluation result."""
        return f"task {self.task}, {self.metric}"

    def __str__(self) -> str:
        return f"{self.task}  {self.metric} {self.value:.4f}" + (f" ± {self.error:.4f}" if self.error is not None else "")


class Tasks:
    """Tasks whose data have been loaded.

    Attributes:
        names: names of tasks and groups, or paths of YAML files.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Load the tasks and their data, before any model.

        Args:
            names: names of tasks and groups of lm-evaluation-harness, or paths of YAML files that describe tasks.

        Raises:
            ImportError: lm-evaluation-harness is not installed.
            ValueError: no task has this name.
            OSError: the data of a task are neither on this machine nor can be fetched.
        """
        check_harness()
        from lm_eval.tasks import TaskManager

        self.names = tuple(names)
        self._manager = TaskManager()
        self._loaded: list[Any] = []
        for name in self.names:
            try:
                found = self._manager.load([name])
            except (KeyError, StopIteration) as error:
                raise ValueError(f"tasks: expected tasks of lm-evaluation-harness, or YAML files, got {name!r}") from error
            except Exception as error:  # of the package datasets, which raises those of any network library
                raise OSError(
                    f"tasks: the data of {name} cannot be loaded: {on_one_line(error)}; fetch them once where there is a network"
                ) from error
            group = found.get("groups", {}).get(name)
            self._loaded += found["tasks"].values() if group is None else [group]

    def evaluate(
        self, model: torch.nn.Module, tokenizer: Any, *, batch_size: int = 8, examples: int | None = None
    ) -> list[TaskResult]:
        """Measure a model, dense or packed.

        Args:
            model: a causal language model of transformers, in memory.
            tokenizer: its tokenizer.
            batch_size: requests at once: a matter of speed and memory.
            examples: only the first ones of each task; None is all.

        Raises:
            ValueError: the model is streamed, so that each batch would read all of its blocks, or the tokenizer has neither a BOS nor
                an EOS token, with which the harness begins a text.
        """
        if stream_of(model) is not None:
            raise ValueError("tasks: expected a model in memory, got a streamed one, of which each batch would read all blocks")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with a BOS or an EOS token, with which a text begins, got one without either")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with evaluation_mode(model), float32_products(model):
            harnessed = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                model=harnessed, tasks=self._loaded, limit=examples, task_manager=self._manager, log_samples=False
            )
        return results_of(found["results"])


def check_harness() -> None:
    """Raise `ImportError` unless lm-evaluation-harness is installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} needed for tasks: pip install 'sparsekern[tasks]'")


def results_of(results: Mapping[str, Mapping[str, object]]) -> list[TaskResult]:
    """Return the metrics in the `results` of lm-evaluation-harness: by task, `"metric,filter"` and its standard error."""
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if comma and not metric.endswith(STDERR) and isinstance(value, (int, float)):
                error = metrics.get(f"{metric}{STDERR},{chosen}")
                name = metric if chosen == UNFILTERED else f"{metric} ({chosen})"
                found.append(TaskResult(task, name, float(value), float(error) if isinstance(error, (int, float)) else None))
    return found


def measured(results: Iterable[TaskResult]) -> dict[str, float]:
    """Return the values by name, as reports hold them."""
    return {result.name: result.value for result in results}
