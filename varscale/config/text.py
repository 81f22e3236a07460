"""YAML 1.2 text to plain values and back: dictionaries, lists, texts, numbers, booleans and None.

The text may come from anyone: no tags make objects of it, and neither its nesting nor anchors that stand for each other
many times over exhaust time or memory.
"""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from varscale.errors import ExperimentError

LONGEST = 2**17
"""Characters of a text, at most: those shipped have 5,000."""
DEEPEST = 32
"""Sections within sections, at most: an experiment has five."""
MOST_VALUES = 20_000
"""Values of a text, those that an alias stands for counted each time."""
LONGEST_NUMBER = 100
"""Digits of a whole number, at most."""

_TEXTS = {f"tag:yaml.org,2002:{name}" for name in ("str", "timestamp", "value")}
_TAGS = _TEXTS | {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "seq", "map", "merge")}


class YAMLTextError(ValueError):
    """Why a text is not YAML, or not plain values; one line."""


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        YAMLTextError: It is not YAML 1.2, gives a key twice, has tags, or is too long or too deep.
    """
    if len(text) > LONGEST:
        raise YAMLTextError(f"{len(text)} characters; at most {LONGEST} are read")
    loader = YAML(typ="safe", pure=True)
    loader.Composer, loader.Constructor, loader.Resolver = _PlainComposer, _PlainConstructor, _Resolver
    try:
        return loader.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YAMLTextError(place + shortened(", ".join(filter(None, (error.context, error.problem))))) from None
    except YAMLError as error:
        raise YAMLTextError(shortened(error)) from None
    # what tags such as !!int make of other texts, and directives of another version
    except (AssertionError, LookupError, ValueError) as error:
        raise YAMLTextError(f"a value can't be read: {shortened(error)}") from None


def read_yaml_file(path: Path) -> Any:
    """The plain values of a YAML file.

    Raises:
        ExperimentError: It can't be read, or `read_yaml` refuses its text; names the file.
    """
    try:
        if path.stat().st_size > 4 * LONGEST:  # bytes, of which a character has four at most
            raise YAMLTextError(f"{path.stat().st_size} bytes, too long for an experiment")
        return read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}") from None
    except (YAMLTextError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: not a YAML file: {shortened(error, 400)}") from None


def write_yaml(values: Any) -> str:
    """YAML text that `read_yaml` reads back to equal values."""
    dumper = YAML(typ="safe", pure=True)
    dumper.Representer, dumper.Resolver = _PlainRepresenter, _Resolver
    dumper.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None
    dumper.default_flow_style = False
    dumper.width = 2**16
    stream = io.StringIO()
    dumper.dump(values, stream)
    return stream.getvalue()


def yaml_line(name: str, value: Any, why: str = "", indent: int = 2) -> str:
    """A field of a YAML text on a line, with a comment that says why."""
    if isinstance(value, list):
        written = f"[{', '.join(map(_number, value))}]"
    else:
        written = _number(value) if isinstance(value, float) else write_yaml({name: value}).partition(": ")[2].strip()
    field = f"{' ' * indent}{name}: {written}"
    return f"{field:<34}    # {' '.join(why.split())}" if why else field


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def shortened(message: object, length: int = 200) -> str:
    """A message on one line, of at most so many characters."""
    words = " ".join(str(message).split())
    return words if len(words) <= length else f"{words[:length]}…"


class _PlainComposer(Composer):
    """Checks the nodes of a text before anything is made of them."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self._composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._composed += 1
        for number, most, what in ((self.depth + 1, DEEPEST, "levels deep"), (self._composed, MOST_VALUES, "values")):
            if number > most:
                raise _refused(f"more than {most} {what}", self.parser.peek_event())
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        root = super().get_single_node()
        # each node as often as aliases name it, since that is how often it is made or merged
        waiting: list[tuple[Node, int]] = [] if root is None else [(root, 1)]
        for _ in range(MOST_VALUES):
            if not waiting:
                return root
            node, level = waiting.pop()
            waiting += [(below, level + 1) for below in _checked(node, level)]
        raise _refused(f"more than {MOST_VALUES} values, those that aliases repeat counted each time", root)


def _checked(node: Node, level: int) -> list[Node]:
    """The nodes below one that is a plain value."""
    tag = str(node.tag)
    if tag not in _TAGS:
        raise _refused(f"the tag {tag.replace('tag:yaml.org,2002:', '!!')} is not allowed; write plain values", node)
    if level > DEEPEST:
        raise _refused(f"more than {DEEPEST} levels deep", node)
    if isinstance(node, ScalarNode):
        if tag.endswith(":int") and len(node.value) > LONGEST_NUMBER:
            raise _refused(f"a whole number of more than {LONGEST_NUMBER} digits", node)
        return []
    if not isinstance(node, MappingNode):
        return list(node.value)
    # the library looks for repeated keys only where no other mapping is merged
    seen: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, ScalarNode)):
        if key.value in seen:
            raise _refused(f"key {shortened(repr(key.value))} is given twice", key)
        seen.add(key.value)
    return [part for pair in node.value for part in pair]


def _refused(problem: str, where: Any) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


class _Resolver(VersionedResolver):
    """Also reads .5e1 as a number, as YAML 1.2 has it."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0] and re.fullmatch(r"[-+]?\.[0-9]+[eE][0-9]+", value):
            return Tag(suffix="tag:yaml.org,2002:float")
        return super().resolve(kind, value, implicit)


class _PlainConstructor(SafeConstructor):
    """Dates, and =, are texts in YAML 1.2's core schema."""


for _tag in _TEXTS:
    _PlainConstructor.add_constructor(_tag, SafeConstructor.construct_yaml_str)


class _PlainRepresenter(SafeRepresenter):
    """Writes the same list twice rather than an anchor and an alias, and quotes all but plain words.

    Some signs are written without quotes where the library's own reader takes them for something else, `{?0: 1}`.
    """

    def represent_str(self, data: str) -> Any:
        plain = re.fullmatch(r"[\w./-]+", data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')

    def ignore_aliases(self, data: Any) -> bool:
        return True


_PlainRepresenter.add_representer(str, _PlainRepresenter.represent_str)
