"""The jobs that come before any model: tokenizer, tokens, and how this machine carries out the study's runs."""

from dataclasses import dataclass
from typing import Any

from sweeps.grid import unfit_sizes
from sweeps.jobs.base import Job, Resources, set_threads
from varscale.errors import ExperimentError, TokenizerRejected
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles
from varscale.store.records import encoded_images
from varscale.training.cells import Trunk
from varscale.training.interruption import Report


@dataclass(frozen=True)
class TokenizerJob(Job):
    """Train and measure the tokenizer; while its figures speak against it, it fails (unless `tokenizer.accept`)."""

    kind = "tokenizer"
    resources = Resources(whole_machine=True)

    @property
    def files(self) -> RunFiles:
        """The tokenizer's."""
        return self.place.tokenizer

    def done(self) -> bool:
        """Whether its result is there, its weights are intact, and it is fit for use."""
        from varscale.evaluation.verdict import check_tokenizer
        from varscale.tokenizer.training import tokenizer_ready

        try:
            check_tokenizer(self.files, self.experiment.tokenizer)
        except TokenizerRejected:
            return False
        return self.files.weights.exists() and tokenizer_ready(self.files)

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.evaluation.verdict import check_tokenizer
        from varscale.tokenizer.training import train_tokenizer

        set_threads(share)
        train_tokenizer(self.experiment, self.files, report)
        check_tokenizer(self.files, self.experiment.tokenizer)

    def outcome(self) -> str:
        """Its figures."""
        from varscale.evaluation.verdict import described

        return described(self.files, self.experiment.tokenizer)


@dataclass(frozen=True)
class TokensJob(Job):
    """Encode the training and validation images."""

    train_images: int

    kind = "tokens"
    needs = ("tokenizer",)
    resources = Resources(whole_machine=True)

    @property
    def files(self) -> RunFiles:
        """The token stores'."""
        return self.place.tokens

    def done(self) -> bool:
        """Whether intact stores of so many training images are there."""
        from varscale.tokenizer.training import tokens_ready

        captioned = self.experiment.data.captions is not None
        return encoded_images(self.place.tokens) >= self.train_images and tokens_ready(
            self.place.tokens, self.train_images, captioned=captioned
        )

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.tokenizer.training import encode_tokens
        from varscale.training.interruption import STOP

        set_threads(share)
        checked = STOP.checked(report)
        encode_tokens(self.experiment, self.place.tokenizer, self.place.tokens, self.train_images, checked)

    def described(self) -> dict[str, Any]:
        """How many images."""
        return {"train_images": self.train_images}


@dataclass(frozen=True)
class ExecutionJob(Job):
    """Decide how this machine carries out the study's runs, and refuse sizes that don't fit into its memory."""

    sizes: tuple[tuple[Trunk, int], ...]
    """Each trunk, with the images that all of its runs take together."""

    kind = "execution"
    needs = ("tokenizer",)

    @property
    def files(self) -> RunFiles:
        """The study's own folder."""
        return RunFiles(self.place.study.folder)

    def done(self) -> bool:
        """Whether it was decided on this machine, as the settings allow."""
        from varscale.training.execution import ExecutionRecord

        record = ExecutionRecord.read(self.place.study.execution)
        return record is not None and record.allowed(self.experiment.runtime)

    def run(self, share: Share, report: Report) -> None:
        """Do it."""
        from varscale.tokenizer.storage import load_tokenizer
        from varscale.training.execution import decide_execution

        set_threads(share)
        if unfit := unfit_sizes((trunk for trunk, _ in self.sizes), share.memory_bytes()):
            raise ExperimentError(f"{unfit} here")
        if not self.done():
            tokenizer = load_tokenizer(self.place.tokenizer.weights, self.place.tokenizer.fingerprint)
            decided = decide_execution(self.sizes, self.experiment.runtime, share, tokenizer)
            decided.write(self.place.study.execution)

    def described(self) -> dict[str, Any]:
        """The sizes."""
        return {"sizes": [(trunk.depth, trunk.seed, trunk.smallest_budget, images) for trunk, images in self.sizes]}
