"""Sections of an experiment that come in several kinds, each in a folder of its own: data sources and model families.

A new kind is a new folder; nothing else is touched. The folder `varscale/data/sources/rings/`, for example, has a
module `config.py` whose `SECTION` is the section that `data: {kind: rings, …}` is read into.
"""

from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from varscale.config.section import Section

S = TypeVar("S", bound=Section)


class Kinds(Generic[S]):
    """The kinds of a section, told apart by one of its fields.

    To be used as an annotation, `data: Annotated[DataSection, DATA_KINDS]`: pydantic then reads the section that the
    field `key` names, and its errors say which field of which kind is wrong.

    Attributes:
        key: The field that names the kind, such as `kind`.
        default: The kind where the field is absent; None: it must be there.
    """

    def __init__(self, key: str, package: str, default: str | None = None) -> None:
        self.key, self.default, self._package = key, default, package

    @classmethod
    def of(cls, field: FieldInfo) -> "Kinds[Any] | None":
        """The kinds that a field of an experiment comes in; None: it is an ordinary field."""
        return next((mark for mark in field.metadata if isinstance(mark, cls)), None)

    @cached_property
    def sections(self) -> dict[str, type[S]]:
        """The section of each kind, by its name."""
        folders = [module.name for module in iter_modules(import_module(self._package).__path__) if module.ispkg]
        modules = [f"{self._package}.{folder}.config" for folder in folders]
        found: list[type[S]] = [import_module(module).SECTION for module in modules if find_spec(module)]
        return {self._name(section): section for section in found}

    def add(self, section: type[S]) -> None:
        """Take in a kind defined elsewhere; experiments know it after `Experiment.model_rebuild(force=True)`."""
        self.sections[self._name(section)] = section

    def differ(self, values: dict[str, Any], change: dict[str, Any]) -> bool:
        """Whether a change to plain values of a section makes another kind of it."""
        return self.key in change and change[self.key] != values.get(self.key, self.default)

    def _name(self, section: type[S]) -> str:
        return str(section.model_fields[self.key].default)

    def _tag(self, value: Any) -> str | None:
        if isinstance(value, Section):
            return getattr(value, self.key, None)
        tag = value.get(self.key, self.default) if isinstance(value, dict) else None
        return tag if tag is None else str(tag)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(section) for name, section in self.sections.items()}
        return core_schema.tagged_union_schema(choices, self._tag)
