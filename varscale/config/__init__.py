"""An experiment: frozen, validated settings, read from YAML by `varscale.config.yaml`.

Every field is documented where it is declared; `Experiment.model_json_schema()` carries the same texts.
Counts are whole numbers of what the name says (images, tokens, steps); FLOPs are 2 × multiply-adds.
"""

from varscale.config.data import Cifar10Data, DataConfig, FolderData, ImageData, ParquetData, RingsData
from varscale.config.evaluation import EvaluationConfig
from varscale.config.experiment import Experiment
from varscale.config.grid import GridConfig, Variant
from varscale.config.model import ModelConfig, OptimConfig
from varscale.config.runtime import RuntimeConfig
from varscale.config.section import Section
from varscale.config.tokenizer import (
    SMALLEST_ADVERSARIAL_IMAGE,
    TokenizerArchitecture,
    TokenizerConfig,
    TokenizerTraining,
)

__all__ = [
    "SMALLEST_ADVERSARIAL_IMAGE",
    "Cifar10Data",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "FolderData",
    "GridConfig",
    "ImageData",
    "ModelConfig",
    "OptimConfig",
    "ParquetData",
    "RingsData",
    "RuntimeConfig",
    "Section",
    "TokenizerArchitecture",
    "TokenizerConfig",
    "TokenizerTraining",
    "Variant",
]
