"""Settings of methods on the command line, derived from the rules that their configs declare."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any, TypeVar

from ..methods import METHODS, BlockTuning, Distill, ExpertMethod, Method, Training, settings_of
from ..pruning.needs import SETTINGS
from ..pruning.quality import DEFAULT_METHOD, Preset, with_quality

TRAINING = ("tune.", "distill.")  # begin the settings of --tune and --distill
TrainingT = TypeVar("TrainingT", bound=Training)


def configured(name: str, assignments: Sequence[tuple[str, str]]) -> Method:
    """Return a config of the method `name` with these settings.

    Args:
        name: a key of `METHODS`.
        assignments: settings and the texts of their values. `solver.damping` is a setting of the method inside.

    Raises:
        ValueError: the method has no such setting or refuses its value, or a setting is given twice.
    """
    kind, rules = METHODS[name], settings_of(METHODS[name])
    part = _part(name)
    given: dict[str, object] = {}
    inner: dict[str, str] = {}
    seen: set[str] = set()
    for setting, text in assignments:
        if setting in seen:
            raise ValueError(f"--set: {setting} is given twice")
        seen.add(setting)
        owner, _, rest = setting.partition(".")
        if setting in rules:
            given[setting] = rules[setting].from_text(f"--set {setting}", text)
        elif part and owner == part and rest:
            inner[rest] = text
        else:
            raise ValueError(f"--set: the method {name} has no setting {setting!r}, only {_listed(name)}")
    if not inner:
        return kind(**given)
    inside = str(given.get(part, rules[part].default))
    kind(**given)  # raises for an unknown method inside
    return kind(**given | {part: _configured_inside(name, part, inside, inner)})


def take_quality(arguments: argparse.Namespace) -> None:
    """Fill in the options that `--quality` stands for, but those of training, and a method that is not given by the default.

    Raises:
        ValueError: an option is given that `--quality` chooses.
    """
    given = Preset(correction=arguments.correction, allocation=arguments.allocation)
    chosen = with_quality(arguments.quality, arguments.pattern, arguments.method, given)
    arguments.method, arguments.correction, arguments.allocation = chosen.method, chosen.correction, chosen.allocation


def methods_of(arguments: argparse.Namespace) -> tuple[Method, Method | None]:
    """Return the method of a command line, and the one of `--then` if there is one.

    Raises:
        ValueError: `--then` without a method that removes experts, or a setting that a method does not accept.
    """
    assignments, name = list(arguments.set), arguments.method or DEFAULT_METHOD
    if arguments.remove is not None:
        if "remove" not in settings_of(METHODS[name]):
            raise ValueError(f"--remove: expected --method experts or kprune, got {name}, which makes weights zero")
        assignments.append(("remove", repr(arguments.remove)))
    training_of(arguments)  # raises for a setting that it does not accept
    prefix = "then."
    own = [(name, value) for name, value in assignments if not name.startswith((prefix, *TRAINING))]
    later = [(name.removeprefix(prefix), value) for name, value in assignments if name.startswith(prefix)]
    method = configured(name, own)
    if arguments.then is None:
        if later:
            raise ValueError(f"--set: expected --then, the method of the setting {prefix}{later[0][0]}")
        return method, None
    if not isinstance(method, ExpertMethod):
        raise ValueError(f"--then: expected --method experts, got {method.name}")
    return method, configured(arguments.then, later)


def training_of(arguments: argparse.Namespace) -> tuple[BlockTuning | None, Distill | None]:
    """Return the settings of `--tune` and `--distill`, None without them.

    Raises:
        ValueError: a setting without its option, twice, or one that the option does not accept.
    """
    tune = _training("tune", BlockTuning, arguments.set) if _asked("tune", arguments.tune, arguments.set) else None
    if not _asked("distill", arguments.distill, arguments.set):
        return tune, None
    steps = ("distill.steps", str(arguments.distill))
    return tune, _training("distill", Distill, [*arguments.set, steps])


def asked_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """Return those of `SETTINGS` that a command line asks for, by name."""
    given = {name: getattr(arguments, name) for name in SETTINGS}
    return {name: value for name, value in given.items() if value and value != SETTINGS[name].neutral}


def _asked(option: str, given: object, assignments: Sequence[tuple[str, str]]) -> bool:
    """Return whether an option is given; raise `ValueError` for its settings without it."""
    found = next((name for name, _ in assignments if name.startswith(f"{option}.")), None)
    if not given and found is not None:
        raise ValueError(f"--set: expected --{option}, which has the setting {found}")
    return bool(given)


def _training(option: str, kind: type[TrainingT], assignments: Sequence[tuple[str, str]]) -> TrainingT:
    """Return the settings of an option, such as `tune.passes`."""
    rules = settings_of(kind)
    given: dict[str, Any] = {}
    for whole, text in assignments:
        prefix, dot, name = whole.partition(".")
        if prefix != option or not dot:
            continue
        if name in given:
            raise ValueError(f"--set: {whole} is given twice")
        if name not in rules:
            raise ValueError(f"--set: --{option} has no setting {name!r}, only {', '.join(rules)}")
        given[name] = rules[name].from_text(f"--set {whole}", text)
    return kind(**given)


def method_help(name: str) -> str:
    """Return the text of `--help-method`: the purpose and the settings of a method."""
    lines = [_first_paragraph(METHODS[name]), ""]
    rules, part = settings_of(METHODS[name]), _part(name)
    if not rules:
        return "\n".join([*lines, f"{name} has no settings."])
    lines.append(f"Settings of --method {name}, each given by --set NAME=VALUE:")
    width = max(map(len, rules))
    for setting, rule in rules.items():
        text = f"{rule.help}; {rule.expected} (default: {_shown(rule.default)})"
        label = f"  {setting:<{width}}  "
        lines += textwrap.wrap(text, 79, initial_indent=label, subsequent_indent=" " * len(label))
    if part:
        example = rules[part].default
        lines.append(f"{part}.NAME=VALUE gives a setting of the {part}; --help-method {example} lists those of {example}.")
    return "\n".join(lines)


def _configured_inside(name: str, part: str, inside: str, inner: dict[str, str]) -> Method:
    """Return a config of the method inside another."""
    rules = settings_of(METHODS[inside])
    for setting in inner:
        if setting not in rules:
            listed = ", ".join(rules) or "none"
            raise ValueError(f"--set: the {part} {inside} of {name} has no setting {setting!r}, only {listed}")
    return METHODS[inside](**{key: rules[key].from_text(f"--set {part}.{key}", text) for key, text in inner.items()})


def _part(name: str) -> str:
    """Return the setting that holds another method, or an empty text."""
    return next((setting for setting, rule in settings_of(METHODS[name]).items() if rule.is_method), "")


def _listed(name: str) -> str:
    part = _part(name)
    return (", ".join(settings_of(METHODS[name])) or "none") + (f", and those of the method inside as {part}.NAME" if part else "")


def _first_paragraph(method: type[Method]) -> str:
    return textwrap.fill(f"{method.name}: {(inspect.getdoc(method) or '').partition(chr(10) * 2)[0]}", 79)


def _shown(value: object) -> str:
    return {True: "true", False: "false", None: "none"}[value] if isinstance(value, bool) or value is None else f"{value}"
