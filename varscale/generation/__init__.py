"""Images from trained models. `varscale.generation.sample` is imported on first use: it needs torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varscale.families.models import Sample
    from varscale.generation.sampling import sample

__all__ = ["Sample", "sample"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from varscale.generation import sampling

        return getattr(sampling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
