"""Experiments as YAML files: finding, reading, overriding, writing, and errors that name file and key."""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from varscale.config import Experiment


class ExperimentError(ValueError):
    """What is wrong with an experiment: file and key, and what would be right; one line."""


def load_experiment(name_or_path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read a shipped experiment by name, or a YAML file by path, with `key=value` overrides merged before validation.

    Raises:
        ExperimentError: unknown name, unreadable file, unknown key, wrong type or inconsistent values.
    """
    path = find_experiment(name_or_path)
    try:
        settings = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not a YAML file: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ExperimentError(f"{path}: expected a mapping of sections (name, data, tokenizer, …)")
    for override in overrides:
        settings = _override(settings, override)
    return validate(settings, str(path), overrides)


def validate(settings: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Experiment:
    """An `Experiment` from plain values; errors name `source`, or the override that caused them."""
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise ExperimentError(_explain(error, source, overrides)) from None


def changed(experiment: Experiment, settings: Mapping[str, Any], source: str) -> Experiment:
    """The experiment with dotted fields changed, validated again."""
    values = experiment.model_dump(mode="json")
    for key, value in settings.items():
        values = _set(values, key, value, source)
    return validate(values, source)


def to_yaml(experiment: Experiment) -> str:
    """The experiment as YAML that `load_experiment` reads back to an equal one."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def shipped_experiments() -> dict[str, Path]:
    """Name → file of the experiments that come with varscale (and its studies)."""
    return {
        str(path.relative_to(folder).with_suffix("")): path
        for folder in _experiment_folders()
        for path in sorted(folder.rglob("*.yaml"))
    }


def find_experiment(name_or_path: str) -> Path:
    """The file of a shipped name or of a path; raises `ExperimentError` with the nearest names."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if path.is_file():
            return path
        raise ExperimentError(f"{path}: no such experiment file")
    shipped = shipped_experiments()
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise ExperimentError(
        f"no experiment {name_or_path!r}{_nearest(name_or_path, list(shipped))}; "
        f"shipped are {', '.join(shipped)}, or give a YAML file's path"
    )


def _experiment_folders() -> Iterator[Path]:
    package = Path(__file__).parent
    for folder in (package / "experiments", package.parent / "experiments"):  # wheel, then checkout
        if folder.is_dir():
            yield folder
            return


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML alone reads 3e-4 and 1e12 as text."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]  # PyYAML's stubs leave it untyped
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _override(settings: dict[str, Any], override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ExperimentError(f"--set {override}: expected section.key=value, such as optim.lr=3e-4")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        raise ExperimentError(f"--set {override}: the value is not YAML") from None
    return _set(settings, key, value, f"--set {override}")


def _set(settings: dict[str, Any], key: str, value: Any, source: str) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    *sections, last = key.split(".")
    target = settings
    for depth, section in enumerate(sections):
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ExperimentError(f"{source}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    target[last] = value
    return settings


def _explain(error: ValidationError, source: str, overrides: Sequence[str]) -> str:
    problems = []
    for detail in error.errors():
        location = [str(part) for part in detail["loc"] if part not in ("rings", "folder", "parquet", "cifar10")]
        key = ".".join(location)
        where = next((f"--set {o}" for o in overrides if o.split("=")[0] == key), source)
        if detail["type"] == "extra_forbidden":
            problems.append(f"{where}: {key}: unknown key{_nearest(location[-1], _valid_keys(location[:-1]))}")
        elif detail["type"] == "missing":
            problems.append(f"{where}: {key}: missing")
        elif detail["type"] == "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            problems.append(f"{where}: {key + '.' if key else ''}{message}")
        else:
            problems.append(f"{where}: {key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}")
    return "; ".join(problems)


def _valid_keys(location: Sequence[str]) -> list[str]:
    """Field names of the section at `location` (of every kind of data source for `data`)."""
    sections: list[Any] = [Experiment]
    for part in location:
        annotations = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
        sections = [model for annotation in annotations for model in _models(annotation)]
    return sorted({name for section in sections for name in section.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
