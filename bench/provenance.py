"""Where a figure comes from: date, commit, machine and versions of the run that measured it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"

Run = dict[str, str]  # "date", "commit", then the machine and the versions; an empty one is unknown


def provenance(machine: Mapping[str, str], root: Path = ROOT) -> Run:
    """Return the provenance of a run that begins now on `machine`, which holds its name, settings and versions."""
    return {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": commit_of(root), **machine}


def commit_of(root: Path = ROOT) -> str:
    """Return the commit that is checked out in `root`, with "+changes" where tracked files other than results differ from it.

    "unknown" without git, outside of a repository, and where `root` is a folder inside another repository.
    """
    if _git(root, "rev-parse", "--show-toplevel") != str(root.resolve()):
        return UNKNOWN
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    if not commit or changed is None:
        return UNKNOWN
    return commit + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True)
class Labels:
    """Distinct runs by a short label: their date and commit, numbered where two runs have both in common."""

    named: tuple[tuple[str, Run], ...]

    def of(self, run: Run) -> str:
        return next(label for label, known in self.named if known == run)

    def described(self) -> list[str]:
        """Return lines of Markdown with all that is known of the runs, one line for those that share machine and versions."""
        by_facts: dict[str, list[str]] = {}
        for label, run in self.named:
            by_facts.setdefault(_facts(run), []).append(label)
        return [f"* {'; '.join(names)}: {facts}." for facts, names in by_facts.items()]


def labels(runs: Iterable[Run]) -> Labels:
    """Return the labels of the distinct runs among `runs`, the latest first."""
    distinct: list[Run] = []
    for run in runs:
        if run not in distinct:
            distinct.append(run)
    distinct.sort(key=lambda run: (run.get("date", ""), run.get("commit", "")), reverse=True)
    named: list[tuple[str, Run]] = []
    for run in distinct:
        label = f"{run.get('date', UNKNOWN)}, {run.get('commit', UNKNOWN)}"
        twins = sum(known == label or known.startswith(f"{label} (") for known, _ in named)
        named.append((f"{label} ({twins + 1})" if twins else label, run))
    return Labels(tuple(named))


def _facts(run: Run) -> str:
    facts = [f"{name} {value}" for name, value in run.items() if name not in ("date", "commit")]
    return ", ".join(facts) or "nothing else is known"
