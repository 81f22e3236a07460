"""An experiment: frozen, validated settings, read from YAML by `varscale.config.yaml`.

Every field is documented where it is declared; `Experiment.model_json_schema()` carries the same texts.
Counts are whole numbers of what the name says (images, tokens, steps); FLOPs are 2 × multiply-adds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varscale.config.data import DataSection
    from varscale.config.evaluation import EvaluationConfig
    from varscale.config.experiment import Experiment
    from varscale.config.grid import GridConfig, Variant
    from varscale.config.optim import OptimConfig
    from varscale.config.runtime import RuntimeConfig
    from varscale.config.section import Section
    from varscale.config.tokenizer import (
        SMALLEST_ADVERSARIAL_IMAGE,
        TokenizerArchitecture,
        TokenizerConfig,
        TokenizerTraining,
    )

# imported when asked for: the sections of data sources and families, of which an experiment is made, import the base
# sections from this package
_MODULES = {
    "SMALLEST_ADVERSARIAL_IMAGE": "tokenizer",
    "DataSection": "data",
    "EvaluationConfig": "evaluation",
    "Experiment": "experiment",
    "GridConfig": "grid",
    "OptimConfig": "optim",
    "RuntimeConfig": "runtime",
    "Section": "section",
    "TokenizerArchitecture": "tokenizer",
    "TokenizerConfig": "tokenizer",
    "TokenizerTraining": "tokenizer",
    "Variant": "grid",
}
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
    "TokenizerTraining",
    "Variant",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
