"""Checkpoints of the reference implementation (github.com/FoundationVision/VAR), in and out.

The functions are imported when they are first used, because they need torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varscale.official.state_dicts import export_tokenizer, export_var, load_tokenizer, load_var

__all__ = ["export_tokenizer", "export_var", "load_tokenizer", "load_var"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from varscale.official import state_dicts

        return getattr(state_dicts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
