"""How cells are measured and shown."""

from varscale.config.section import Count, CountOrZero, Fraction, NonNegative, Section


class EvaluationConfig(Section):
    """How cells are measured and shown."""

    batch_size: Count = 256
    """Images a batch on the validation set."""
    samples_per_class: CountOrZero = 4
    """Sampled images a class in the sample grid; 0: none."""
    sample_classes: Count = 8
    """Classes shown in the sample grid, at most."""
    guidance: NonNegative = 1.5
    """Classifier-free guidance of the last scale, ramped up from 0."""
    top_k: CountOrZero = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: Fraction = 0.0
    """Sample among the likeliest tokens that hold this probability; 0: all."""
