"""How cells are measured and shown."""

from typing import Annotated

from pydantic import Field

from varscale.config.section import BatchSize, Classes, Fraction, Real, Section, Whole


class EvaluationConfig(Section):
    """How cells are measured and shown."""

    batch_size: BatchSize = 256
    """Images a batch on the validation set."""
    samples_per_class: Annotated[Whole, Field(ge=0, le=2**16)] = 4
    """Sampled images a class in the sample grid; 0: none."""
    sample_classes: Classes = 8
    """Classes shown in the sample grid, at most."""
    guidance: Annotated[Real, Field(ge=0, le=1e6)] = 1.5
    """Classifier-free guidance of the last scale, ramped up from 0."""
    top_k: Annotated[Whole, Field(ge=0, le=2**24)] = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.0
    """Sample among the likeliest tokens that hold this probability; 0: all."""
