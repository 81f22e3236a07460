"""Experiments as YAML files: finding, reading, overriding, writing, and errors that name file and key."""

import copy
import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from varscale.config import Experiment
from varscale.errors import ExperimentError


def load_experiment(name_or_path: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read a shipped experiment by name, or a YAML file by path, with `key=value` overrides merged before validation.

    Raises:
        ExperimentError: unknown name, unreadable file, unknown key, wrong type or inconsistent values.
    """
    path = find_experiment(name_or_path)
    try:
        settings = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not a YAML file: {_one_line(error)}") from None
    if not isinstance(settings, dict):
        raise ExperimentError(f"{path}: expected a mapping of sections (name, data, tokenizer, …)")
    for override in overrides:
        settings = _override(settings, override)
    return validate(settings, str(path), overrides)


def validate(settings: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Experiment:
    """An `Experiment` from plain values; errors name `source`, or the override that caused them.

    The settings that `by_depth` and the grid's variants would change are tried as well, so that a mistake in them shows
    before anything is trained.
    """
    experiment = _validated(settings, source, overrides)
    changes = {f"by_depth.{depth}": change for depth, change in experiment.by_depth.items()}
    changes |= {f"grid.variants.{variant.name}": variant.settings for variant in experiment.grid.variants}
    for place, change in changes.items():
        for key in change:
            if not key.startswith(("model.", "optim.")):
                raise ExperimentError(
                    f"{source}: {place}: {key}: only fields of model and optim can be changed here, such as optim.lr"
                )
        changed(experiment, change, f"{source}: {place}")
    return experiment


def changed(experiment: Experiment, settings: Mapping[str, Any], source: str) -> Experiment:
    """The experiment with dotted fields changed, validated again; errors name `source`."""
    values = experiment.model_dump(mode="json")
    for key, value in settings.items():
        values = _set(values, key, value, source)
    return _validated(values, source)


def sets(override: str, key: str) -> bool:
    """Whether an override set this field, its section, or the section's kind, which decides what its fields are."""
    section = override.partition("=")[0].removesuffix(".kind")
    return f"{key}.".startswith(f"{section}.")


def to_yaml(experiment: Experiment) -> str:
    """The experiment as YAML that `load_experiment` reads back to an equal one."""
    return yaml.dump(experiment.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
    shipped = shipped_experiments()
    if name_or_path in shipped:  # before a file or folder of that name here, such as runs/rings
        return shipped[name_or_path]
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ExperimentError(f"{path}: no such experiment file")
    raise ExperimentError(
        f"no experiment {name_or_path!r}{_nearest(name_or_path, list(shipped))}; "
        f"shipped are {', '.join(shipped)}, or give a YAML file's path"
    )


def _experiment_folders() -> Iterator[Path]:
    package = Path(__file__).parents[1]
    for folder in (package / "experiments", package.parent / "experiments"):  # wheel, then checkout
        if folder.is_dir():
            yield folder
            return


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats and booleans, and no repeated keys.

    PyYAML alone reads 3e-4 and 1e12 as text, `on` and `off` as booleans, and silently keeps the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a float or boolean."""


_BOOLEAN = ("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN[0]]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(*_BOOLEAN)
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


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


def _validated(settings: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Experiment:
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise ExperimentError(_explain(error, source, overrides)) from None


def _explain(error: ValidationError, source: str, overrides: Sequence[str]) -> str:
    details = error.errors()
    inner = [detail for detail in details if not any(_within(other["loc"], detail["loc"]) for other in details)]
    changes = [f"--set {override}" for override in overrides]
    together = " ".join([source, *(["with", *changes] if changes else [])])
    problems = []
    for detail in inner:
        key, message = _problem(detail)
        own = (change for change, override in zip(changes, overrides, strict=True) if sets(override, key))
        # a section's own check may fail through values that are each right
        place = next(own, together if detail["type"] == "value_error" else source)
        problems.append(f"{place}: {key}: {message}")
    return "; ".join(problems)


def _within(inner: Sequence[Any], outer: Sequence[Any]) -> bool:
    return len(inner) > len(outer) and tuple(inner[: len(outer)]) == tuple(outer)


def _problem(detail: ErrorDetails) -> tuple[str, str]:
    """The dotted key that is wrong, and what is wrong with it."""
    location = [str(part) for part in detail["loc"]]
    if location[:1] == ["data"]:
        del location[1:2]  # pydantic puts the kind of data there
    key = ".".join(location)
    shown = reprlib.repr(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return key, f"unknown key{_nearest(location[-1], _valid_keys(location[:-1]))}"
        case "missing":
            return key, "missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            return key, f"expected a section of keys, got {shown}"
        case "tuple_type":
            return key, f"expected a list, such as [12, 16], got {shown}"
        case "union_tag_not_found":
            return f"{key}.kind", f"missing; one of {', '.join(_data_kinds())}"
        case "union_tag_invalid":
            kinds, given = _data_kinds(), str(detail["ctx"]["tag"])
            return f"{key}.kind", f"{given!r} is none of {', '.join(kinds)}{_nearest(given, kinds)}"
        case "value_error":
            # a section's own check names the field first, "patch_nums: must grow strictly"; a field's check doesn't
            field, _, message = detail["msg"].removeprefix("Value error, ").partition(": ")
            return (f"{key}.{field}".lstrip("."), message) if message else (key, field)
    return key, f"{detail['msg'][0].lower()}{detail['msg'][1:]}, got {shown}"


def _data_kinds() -> list[str]:
    models = _models(Experiment.model_fields["data"].annotation)
    return [kind for model in models for kind in get_args(model.model_fields["kind"].annotation)]


def _valid_keys(location: Sequence[str]) -> list[str]:
    """Field names of the section at `location` (of every kind of data source for `data`)."""
    sections: list[Any] = [Experiment]
    for part in location:
        if not part.isdecimal():  # a position in a list of sections
            annotations = [s.model_fields[part].annotation for s in sections if part in s.model_fields]
            sections = [model for annotation in annotations for model in _models(annotation)]
    return sorted({name for section in sections for name in section.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _nearest(word: str, choices: Sequence[str]) -> str:
    within = [choice for choice in choices if choice.endswith(f"/{word}")]
    close = within or difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
