"""An experiment: frozen, validated settings, read from YAML by `varscale.config.yaml`.

Every field is documented where it is declared; `Experiment.model_json_schema()` carries the same texts.
Counts are whole numbers of what the name says (images, tokens, steps); FLOPs are 2 × multiply-adds.
"""

from typing import TYPE_CHECKING, Any

from varscale.config.data import DataSection
from varscale.config.section import EvaluationConfig, GridConfig, OptimConfig, RuntimeConfig, Section
from varscale.config.tokenizer import SMALLEST_ADVERSARIAL_IMAGE, TokenizerArchitecture, TokenizerConfig

if TYPE_CHECKING:
    from varscale.config.experiment import Experiment

__all__ = [
    "SMALLEST_ADVERSARIAL_IMAGE",
    "DataSection",
    "EvaluationConfig",
    "Experiment",
    "GridConfig",
    "OptimConfig",
    "RuntimeConfig",
    "Section",
    "TokenizerArchitecture",
    "TokenizerConfig",
]


def __getattr__(name: str) -> Any:
    """`Experiment`, when it is asked for: it imports the sections of all sources, which import this package."""
    if name != "Experiment":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from varscale.config.experiment import Experiment

    return Experiment
