"""Experiments as YAML files: finding, reading with `extends:` and `--set`, writing; errors name file and key.

An experiment may extend another, `extends: rings` (a shipped one) or `extends: ../rings.yaml` (a file, from where this
one lies), and then states only what differs: sections are merged, any other value is replaced, lists and `search.space`
as a whole. Where it names another kind of a section (`data.kind`, `model.family`), the whole section is replaced.

A file may hold several experiments, its `members`, which share what the rest of the file says: `members: {var: {},
raster: {model: {family: raster}}}`. Each states what differs in the same way, and is called `file:raster` wherever an
experiment is named. Its own name is that of the file's study and its own, such as families-raster.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from varscale.config.experiment import Experiment
from varscale.config.explain import KINDS, Key, Place, explain, nearest
from varscale.config.text import YAMLTextError, read_yaml, read_yaml_file, shortened
from varscale.errors import ExperimentError

_MEMBER = "[a-z0-9][a-z0-9-]{0,99}"
"""Name of a member."""


def load_experiment(name_or_path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read a shipped experiment by name, or a YAML file by path, with `key=value` overrides merged before validation.

    Raises:
        ExperimentError: unknown name, unreadable file, unknown key, wrong type or inconsistent values.
    """
    path, member = _found(name_or_path)
    settings: dict[str, Any] = {}
    sources = _Sources(str(path), overrides)
    for file, own in reversed(_extended_files(path, member)):
        settings = _merged(settings, own, str(file), sources.files)
    return _checked(overridden(settings, overrides), sources)


def overridden(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Plain values with `key=value` overrides merged in.

    Raises:
        ExperimentError: an override that isn't one.
    """
    for override in overrides:
        settings = _override(settings, override)
    return settings


def validate(settings: Mapping[str, Any], source: str) -> Experiment:
    """An `Experiment` from plain values; errors name `source`.

    What `by_depth` and the grid's variants would change is tried as well, so that mistakes in it show before training.
    """
    return _checked(settings, _Sources(source))


def changed(experiment: Experiment, settings: Mapping[str, Any], source: str) -> Experiment:
    """The experiment with dotted fields changed, validated again; errors name `source`."""
    return _changed(experiment, settings, lambda key, by_section: source)


def sets(override: str, key: str) -> bool:
    """Whether an override set this field, its section, or the section's kind, which decides what its fields are."""
    section = override.partition("=")[0]
    section = next((name for name, kinds in KINDS.items() if section == f"{name}.{kinds.key}"), section)
    return f"{key}.".startswith(f"{section}.")


def shipped_experiments() -> dict[str, Path]:
    """Name → file of the experiments that come with varscale (and its studies)."""
    package = Path(__file__).parents[1]
    in_wheel, in_checkout = package / "experiments", package.parent / "experiments"
    folder = in_wheel if in_wheel.is_dir() else in_checkout
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def parts_of(name_or_path: str) -> tuple[str, ...]:
    """What `load_experiment` reads of a file: its members, each by `file:member`, or the one experiment that it is."""
    path, member = _found(name_or_path)
    members = None if member else _members(_read(path), path)
    return (name_or_path,) if members is None else tuple(f"{name_or_path}:{each}" for each in members)


def name_of(name_or_path: str) -> str:
    """Name of the study that a file's members are compared in."""
    return str(_read(_found(name_or_path)[0])["name"])


def as_extended(name_or_path: str, folder: Path) -> str:
    """What a file in a folder writes after `extends:` to extend an experiment."""
    path, member = _found(name_or_path)
    shipped = next((name for name, file in shipped_experiments().items() if file == path), None)
    return (shipped or os.path.relpath(path, folder)) + (f":{member}" if member else "")


def _found(name_or_path: str) -> tuple[Path, str | None]:
    """An experiment's file, and which of its members is named."""
    path, member = _shipped_or_file(name_or_path, Path())
    if _is_file(path):
        return path, member
    if path.suffix in (".yaml", ".yml"):
        raise ExperimentError(f"{shortened(path)}: no such experiment file")
    raise ExperimentError(
        f"no experiment {shortened(repr(name_or_path))}{_choices(name_or_path)}, or give a YAML file's path"
    )


@dataclass
class _Sources:
    """Where the values of an experiment were written."""

    top: str
    overrides: Sequence[str] = ()
    files: dict[Key, str] = field(default_factory=dict)
    """Key → file, of a section as of all in it that has no entry of its own."""

    def place(self, key: Key, by_section: bool = False) -> str:
        """Where a value was written; `by_section`: a check failed that looks at other values, too."""
        for override in reversed(self.overrides):
            if sets(override, ".".join(key)):
                return _shown(override)
        ends = range(len(key), 0, -1)
        file = next((self.files[key[:end]] for end in ends if key[:end] in self.files), self.top)
        written = file if file == self.top else f"{file} (extended by {self.top})"
        return " ".join([written, "with", *map(_shown, self.overrides)]) if by_section and self.overrides else written


def _shipped_or_file(name: str, folder: Path) -> tuple[Path, str | None]:
    """A shipped experiment, before a file or folder of that name (such as runs/rings), which may be missing.

    With the member that the name ends in, unless a file is called so.
    """
    of_member = re.fullmatch(rf"(.+):({_MEMBER})", name)
    if of_member and name not in shipped_experiments() and not _is_file(folder / name):
        return _shipped_or_file(of_member[1], folder)[0], of_member[2]
    return shipped_experiments().get(name, folder / name), None


def _choices(name: str) -> str:
    shipped = list(shipped_experiments())
    studies = [each.removeprefix("studies/") for each in shipped if each.startswith("studies/")]
    others = [each for each in shipped if not each.startswith("studies/")]
    return f"{nearest(name, shipped)}; shipped are {', '.join(others)}, and in studies/ {', '.join(studies)}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero character
        return False


def _extended_files(path: Path, member: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """A file and its own values, those of its member before all others, then what it extends, and so on."""
    found: list[tuple[Path, dict[str, Any]]] = []
    while True:
        settings = _read(path)
        members = _members(settings, path)
        if members is not None or member is not None:
            found.append((path, _member(members or {}, member, settings.get("name"), path)))
        settings.pop("members", None)
        found.append((path, settings))
        extended = settings.pop("extends", None)
        if extended is None:
            return found
        by, (path, member) = path, _extended(extended, path)
        if any(path.resolve() == file.resolve() for file, _ in found):
            raise ExperimentError(f"{by}: extends: {path}, which already extends {by}: a circle")


def _members(settings: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]] | None:
    """What each member of a file states; None where it is one experiment."""
    members = settings.get("members")
    if members is None and "members" not in settings:
        return None
    if not isinstance(members, dict) or not members:
        raise ExperimentError(f"{path}: members: expected names with what each changes, such as raster: {{model: …}}")
    for name, changes in members.items():
        if not re.fullmatch(_MEMBER, str(name)):
            raise ExperimentError(
                f"{path}: members: {shortened(repr(name))}: expected lower-case letters, digits and -"
            )
        if not isinstance(changes, dict):
            raise ExperimentError(f"{path}: members.{name}: expected sections that it changes, or {{}} for none")
    if not isinstance(settings.get("name"), str):
        raise ExperimentError(f"{path}: name: missing; a file with members states the name of their study")
    return {str(name): changes for name, changes in members.items()}


def _member(members: Mapping[str, dict[str, Any]], member: str | None, study: Any, path: Path) -> dict[str, Any]:
    """The values of one member."""
    known = f"its members are {', '.join(members)}" if members else "it has no members"
    if member is None:
        raise ExperimentError(
            f"{path}: holds several experiments; name one of them, such as {path}:{next(iter(members))}"
        )
    if member not in members:
        raise ExperimentError(f"{path}:{member}: no such member{nearest(member, list(members))}; {known}")
    return {"name": f"{study}-{member}", **members[member]}


def _extended(name: Any, by: Path) -> tuple[Path, str | None]:
    if not isinstance(name, str):
        raise ExperimentError(
            f"{by}: extends: expected a shipped experiment's name or a file's path, got {shortened(repr(name))}"
        )
    path, member = _shipped_or_file(name, by.parent)
    if not _is_file(path):
        raise ExperimentError(f"{by}: extends: no such file {shortened(path)}{_choices(name)}")
    return path, member


def _read(path: Path) -> dict[str, Any]:
    settings = read_yaml_file(path)
    if not isinstance(settings, dict):
        raise ExperimentError(f"{path}: expected a mapping of sections (name, data, tokenizer, …)")
    return settings


def _merged(
    settings: Mapping[Any, Any], change: Mapping[Any, Any], file: str, files: dict[Key, str], above: Key = ()
) -> dict[Any, Any]:
    """Settings changed by those of a file that extends them; `files` is kept up to date."""
    merged = dict(settings)
    for name, value in change.items():
        key, old = (*above, str(name)), settings.get(name)
        kinds = None if above else KINDS.get(name)
        if (
            isinstance(old, dict)
            and isinstance(value, dict)
            and not (key == ("search", "space") or (kinds and kinds.differ(old, value)))
        ):
            merged[name] = _merged(old, value, file, files, key)
            continue
        for replaced in [known for known in files if known[: len(key)] == key]:
            del files[replaced]
        merged[name], files[key] = value, file
    return merged


def _override(settings: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ExperimentError(f"{_shown(override)}: expected section.key=value, such as optim.lr=3e-4")
    if key == "extends":
        raise ExperimentError(f"{_shown(override)}: only a file can extend another; name that one instead")
    try:
        value = read_yaml(text)
    except YAMLTextError as error:
        raise ExperimentError(f"{_shown(override)}: the value is not YAML: {error}") from None
    return _set(settings, key, value, _shown(override))


def _set(settings: Mapping[str, Any], key: str, value: Any, source: str) -> dict[str, Any]:
    """A copy of plain values, in which one is another."""
    changed_settings = target = dict(settings)
    *sections, last = key.split(".")
    for place, section in enumerate(sections):
        below = target.get(section, {})
        if not isinstance(below, dict):
            raise ExperimentError(f"{source}: {'.'.join(sections[: place + 1])} is a value, not a section")
        target[section] = target = dict(below)
    target[last] = value
    return changed_settings


def _checked(settings: Mapping[str, Any], sources: _Sources) -> Experiment:
    experiment = _validated(settings, sources.place)
    changes: list[tuple[Key, Mapping[str, Any]]] = [
        (("by_depth", str(depth)), change) for depth, change in experiment.by_depth.items()
    ]
    changes += [(("grid", "variants", variant.name), variant.settings) for variant in experiment.grid.variants]
    for at, change in changes:

        def place(key: Key, by_section: bool = False, at: Key = at) -> str:
            return f"{sources.place((*at, '.'.join(key)), by_section)}: {'.'.join(at)}"

        for key in change:
            if not key.startswith(("model.", "optim.")):
                allowed = "only fields of model and optim can be changed here, such as optim.lr"
                raise ExperimentError(f"{place((key,))}: {key}: {allowed}")
        _changed(experiment, change, place)
    return experiment


def _changed(experiment: Experiment, settings: Mapping[str, Any], place: Place) -> Experiment:
    values = experiment.model_dump(mode="json")
    for key, value in settings.items():
        values = _set(values, key, value, place((key,), False))
    return _validated(values, place)


def _validated(settings: Mapping[str, Any], place: Place) -> Experiment:
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise ExperimentError(explain(error, place)) from None


def _shown(override: str) -> str:
    return f"--set {shortened(override)}"
