"""How a study computes and of which inputs: as it was decided, or as the study does whose finished work it takes."""

from collections.abc import Sequence
from typing import NamedTuple

from varscale.config import Experiment
from varscale.store.fingerprint import (
    DataIdentity,
    agrees,
    processors,
    stored_numerics,
    tokenizer_fingerprint,
    tokens_fingerprint,
)
from varscale.store.layout import ExperimentFiles
from varscale.training.cells import Cell, Numerics


class Decided(NamedTuple):
    """What identifies a study's inputs and arithmetic."""

    numerics: Numerics | None
    """None: to be measured."""
    tokenizer_threads: int
    tokenizer: str
    """Fingerprint."""
    tokens: str
    """Fingerprint of the token stores."""


def decided(experiment: Experiment, files: ExperimentFiles, cells: Sequence[Cell], data: DataIdentity) -> Decided:
    """What the study was begun with; a new one takes what most of its cells, or else its tokenizer, were finished with.

    Decided anew it might come out otherwise, and work that another study of the runs folder has finished would be done
    a second time.

    Args:
        experiment: The settings, which may rule numerics out.
        files: The study's files.
        cells: Its cells.
        data: `data_identity` of its data.
    """

    def inputs(numerics: Numerics | None, threads: int) -> Decided:
        threads = experiment.runtime.tokenizer_threads or threads
        tokenizer = tokenizer_fingerprint(experiment, data, threads)
        return Decided(numerics, threads, tokenizer, tokens_fingerprint(experiment, data, tokenizer))

    own = stored_numerics(files)
    if own is not None:
        return inputs(own if agrees(own, experiment.runtime) else None, own.tokenizer_threads)
    others = filter(None, map(stored_numerics, files.others()))
    allowed = [numerics for numerics in others if agrees(numerics, experiment.runtime)]
    ways = [inputs(None, processors()), *(inputs(numerics, numerics.tokenizer_threads) for numerics in allowed)]

    def finished(way: Decided) -> tuple[int, bool]:
        prints = [cell.fingerprint(way.tokens, way.numerics) for cell in cells] if way.numerics else []
        has_tokenizer = files.tokenizer(way.tokenizer).has_tokenizer(way.tokenizer)
        return sum(files.finished_cell(print_) is not None for print_ in prints), has_tokenizer

    best = max(dict.fromkeys(ways), key=finished)
    return best if finished(best)[0] else best._replace(numerics=None)
