"""Images from trained models. The functions are imported on first use: they need torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varscale.families.models import Sample
    from varscale.generation.editing import Edited, edit
    from varscale.generation.sampling import sample

__all__ = ["Edited", "Sample", "edit", "sample"]
_EDITING = ("Edited", "edit")


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{'editing' if name in _EDITING else 'sampling'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
