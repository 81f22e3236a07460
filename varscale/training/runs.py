"""Trunk and cell runs of a model: from settings to checkpoints, metrics and result files."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varscale.data.captions import open_encoder
from varscale.data.loading import EvaluationBatches, StepBatches
from varscale.data.tokens.captions import StoredCaptions
from varscale.data.tokens.manifest import class_names
from varscale.data.tokens.store import TokenStore
from varscale.errors import Diverged, TokenStoreError
from varscale.evaluation.verdict import recorded_faults
from varscale.families.models import LatentModel
from varscale.families.storage import save_model
from varscale.generation.pictures import save_pictures
from varscale.generation.sampling import sample
from varscale.numerics.device import best_device, deterministic
from varscale.store.layout import RunFiles, TokenFiles
from varscale.store.records import CaptionsRecord, Result, RunIdentity, TokensSummary, read_result
from varscale.tokenizer.storage import load_tokenizer
from varscale.training.callbacks import Checkpoints, ProgressCallback, ScheduleCallback, Throughput
from varscale.training.cells import Cell, Execution, Trunk, provenance
from varscale.training.distributed import Team
from varscale.training.execution import check_memory
from varscale.training.interruption import Report
from varscale.training.module import ModelModule
from varscale.training.schedules import Schedule
from varscale.training.trainer import Continuation, Loader, make_trainer, remove_checkpoint, usable_checkpoint


@dataclass(frozen=True)
class Inputs:
    """What the trunks and cells of a study share."""

    tokenizer: RunFiles
    """The finished tokenizer."""
    tokens: TokenFiles
    """Its tokens of the training and validation images."""
    execution: Execution = field(default_factory=Execution)
    """How this machine carries the runs out."""


def train_trunk(trunk: Trunk, milestones: Sequence[int], files: RunFiles, inputs: Inputs, report: Report) -> None:
    """Train a trunk until every milestone (images seen) has its checkpoint.

    Starts from the furthest usable checkpoint that lies before the first missing milestone.

    Raises:
        Diverged: The loss is not finite; the milestones before that are kept.
    """
    run = _Run(trunk, files, inputs, report)

    def begin() -> tuple[int, Path | None]:
        """The last milestone that is missing, 0 where none is, and where to start from."""
        missing = sorted(images for images in milestones if not files.milestone(images).exists())
        if not missing:
            return 0, None
        RunIdentity(name=trunk.title, role="trunk", params=trunk.parameters()).write(files.identity)
        own = dict.fromkeys((*files.milestones, files.last_checkpoint), files.fingerprint)
        return missing[-1], run.furthest(own, missing[0])

    with run.locked():
        with run.team.together(files.fingerprint):
            last, start = run.team.agree(begin)
            if last:
                run.fit(_schedule(trunk), last, start, {images: files.milestone(images) for images in milestones})
        if last and run.leads:
            remove_checkpoint(files.last_checkpoint)  # the last milestone is the same


def train_cell(cell: Cell, trunk_files: RunFiles | None, files: RunFiles, inputs: Inputs, report: Report) -> None:
    """Train a cell from its trunk's checkpoint (or, without one, from the start), measure it, write its result last.

    Raises:
        Diverged: The loss is not finite.
    """
    run = _Run(cell.trunk, files, inputs, report)
    started = time.time()

    def begin() -> tuple[bool, Path | None]:
        """Whether there is anything to do, and where to start from."""
        if read_result(files) is not None:
            return False, None
        RunIdentity(name=cell.title, role="cell", params=cell.parameters()).write(files.identity)
        start = run.furthest({files.last_checkpoint: files.fingerprint}, cell.images)
        if start is None and trunk_files is not None:  # a branch is equal, to the bit, to a run of the whole schedule
            milestones = dict.fromkeys(trunk_files.milestones, trunk_files.fingerprint)
            start = run.furthest(milestones, cell.branch_images)
        return True, start

    with run.locked():
        with run.team.together(files.fingerprint):
            wanted, start = run.team.agree(begin)
            if not wanted:
                return
            module, speed = run.fit(_schedule(cell.trunk, cell), cell.images, start, {})
        if not run.leads:
            return
        figures = _evaluate(module, cell, inputs)
        if not math.isfinite(figures["loss"]):
            raise Diverged(f"after the last step the validation loss is {figures['loss']}")
        pictures = _draw_samples(module, cell, inputs, files)
        save_model(files.weights, module.model, files.fingerprint)
        figures |= {**speed, "wall_seconds": time.time() - started}
        _result(cell, files, inputs, "finished", figures, pictures=pictures).write(files.result)
        remove_checkpoint(files.last_checkpoint)


def record_divergence(cell: Cell, files: RunFiles, inputs: Inputs, reason: str) -> None:
    """Write the result of a cell that diverged, in its trunk or its branch."""
    RunIdentity(name=cell.title, role="cell", params=cell.parameters()).write(files.identity)
    _result(cell, files, inputs, "diverged", {"wall_seconds": 0.0}, reason=reason).write(files.result)


def _result(
    cell: Cell, files: RunFiles, inputs: Inputs, status: Any, figures: Mapping[str, float], **rest: Any
) -> Result:
    summary = TokensSummary.read(inputs.tokens.summary)
    faults = recorded_faults(inputs.tokenizer, cell.trunk.experiment.tokenizer)
    entropy = "unigram_bit_entropy" if cell.trunk.model.draws == "bits" else "unigram_entropy"
    row = {
        "run": files.folder.name[:-8],
        **cell.parameters(),
        "unique_images": summary and summary.images,
        "epochs": summary and cell.images / summary.images,
        **figures,
        "unigram_entropy": summary and getattr(summary, entropy),
        "tokenizer_fingerprint": inputs.tokenizer.fingerprint,
        **({"latents_fingerprint": inputs.tokens.fingerprint} if cell.trunk.model.reads == "latents" else {}),
        "tokenizer_faults": None if faults is None else "; ".join(fault.what for fault in faults),
        "fingerprint": files.fingerprint,
        "status": status,
    }
    numbers = {name: float(value) for name, value in row.items() if type(value) in (int, float)}
    return Result(
        fingerprint=files.fingerprint,
        status=status,
        time=time.time(),
        metrics=numbers,
        row=row,
        provenance=provenance(inputs.execution, cell.trunk),
        class_names=class_names(inputs.tokens.train),
        captions=_captions_record(cell, inputs),
        **rest,
    )


@dataclass(frozen=True)
class _Run:
    """A run of a model, of a trunk or of a cell."""

    trunk: Trunk
    files: RunFiles
    inputs: Inputs
    report: Report

    @property
    def team(self) -> Team:
        """The processes that carry it out."""
        return Team(self.inputs.execution.peers, self.trunk.resources.sharded)

    @property
    def leads(self) -> bool:
        """Whether this process is the one of them that writes files."""
        return self.inputs.execution.peers.leads

    def locked(self) -> AbstractContextManager[object]:
        """Hold the run's lock: another process that makes the same run is waited for."""
        return self.files.locked() if self.leads else nullcontext()

    def furthest(self, checkpoints: Mapping[Path, str], before_or_at: int) -> Path | None:
        """The usable checkpoint (path → fingerprint) that is furthest, but not beyond so many images."""
        reached = {}
        for path, fingerprint in checkpoints.items():
            checkpoint = usable_checkpoint(path, fingerprint)
            if checkpoint is not None and (images := self._images(checkpoint)) <= before_or_at:
                reached[path] = images
        return max(reached, key=lambda path: reached[path], default=None)

    def fit(
        self, schedule: Schedule, total_images: int, start: Path | None, milestones: Mapping[int, Path]
    ) -> tuple[ModelModule, dict[str, float]]:
        """Train up to `total_images`; the module, whole on the first process, and how fast it went."""
        trunk, batch, runtime = self.trunk, self.trunk.batch_size, self.trunk.experiment.runtime
        peers = self.inputs.execution.peers
        module, seen = self._module(), 0
        if start is not None:
            checkpoint = torch.load(start, map_location="cpu", weights_only=True, mmap=True)
            seen = self._images(checkpoint)
            if seen >= total_images:
                module.load_state_dict(checkpoint["state_dict"])
                return module, {}
        store = TokenStore.open(self.inputs.tokens.train, self.inputs.tokenizer.fingerprint)
        steps = (total_images - seen) // batch
        batches = Loader(
            StepBatches(
                store,
                seed=trunk.seed,
                batch_size=batch,
                start_step=seen // batch,
                num_steps=steps,
                rank=peers.rank,
                world_size=peers.count,
            )
        )
        throughput = Throughput(
            batch,
            runtime.log_every_steps,
            trunk.model.executed_training_flops(),
            self.inputs.execution.peak_flops * peers.count,
            lambda: batches.seconds,
        )
        callbacks = [
            Continuation(self.files.fingerprint),
            ScheduleCallback(schedule),
            throughput,
            Checkpoints(self.files.last_checkpoint, runtime.checkpoint_seconds, milestones),
            ProgressCallback(lambda images: self.report(images, total_images)),
        ]
        trainer = make_trainer(self.files, batch, callbacks, precision=trunk.experiment.optim.precision, team=self.team)
        with deterministic():
            trainer.fit(module, batches, ckpt_path=start, weights_only=True)
        if self.team.sharded and peers.count > 1:
            weights = self.team.whole_weights(module.model)
            if peers.leads:
                module = self._module()
                module.model.load_state_dict(weights)
        return module, throughput.figures

    def _module(self) -> ModelModule:
        trunk, execution = self.trunk, self.inputs.execution
        torch.set_num_threads(execution.threads)
        images = trunk.images_at_once(execution.memory_bytes)
        check_memory(trunk.step_bytes(images), "runtime.micro_batch")
        module = ModelModule(
            trunk.model,
            trunk.experiment.optim,
            load_tokenizer(self.inputs.tokenizer.weights, self.inputs.tokenizer.fingerprint),
            seed=trunk.seed,
            compiled=execution.compiled,
            images_at_once=images,
            log_every_steps=trunk.experiment.runtime.log_every_steps,
        )
        if isinstance(module.model, LatentModel):
            summary = TokensSummary.read(self.inputs.tokens.summary)
            if summary is None or not summary.latent_mean:
                raise TokenStoreError(f"{self.inputs.tokens.summary}: no statistics of latents; encode them again")
            module.model.set_statistics(summary.latent_mean, summary.latent_deviation)
        return module

    def _images(self, checkpoint: Mapping[str, Any]) -> int:
        return int(checkpoint["state_dict"]["steps"]) * self.trunk.batch_size


def _schedule(trunk: Trunk, cell: Cell | None = None) -> Schedule:
    """Of a cell, or of a trunk: the same without an end."""
    optim = trunk.experiment.optim
    linear = optim.schedule == "linear"
    return Schedule(
        optim.schedule if cell is not None else "wsd",  # whose beginning is that of a cosine, too
        trunk.peak_lr,
        optim.batch_size,
        trunk.warmup_images,
        None if cell is None else cell.images,
        0 if linear or cell is None else cell.decay_images,
        optim.final_lr_ratio,
        optim.weight_decay,
        optim.final_weight_decay if linear else None,
    )


def _evaluate(module: ModelModule, cell: Cell, inputs: Inputs) -> dict[str, float]:
    """Loss and error on the whole validation set, without label dropout."""
    store = TokenStore.open(inputs.tokens.validation, inputs.tokenizer.fingerprint)
    batches = EvaluationBatches(store, batch_size=cell.trunk.experiment.evaluation.batch_size)
    trainer = make_trainer(inputs.tokens, 1, [], precision=cell.trunk.experiment.optim.precision)
    module.prediction.reset()
    with deterministic():
        trainer.validate(module, Loader(batches), verbose=False)
    return module.prediction.compute()


def _draw_samples(module: ModelModule, cell: Cell, inputs: Inputs, files: RunFiles) -> tuple[str, ...]:
    """A grid of samples, a row a class or a caption."""
    evaluation = cell.trunk.experiment.evaluation
    if evaluation.samples_per_class == 0:
        return ()
    shown_R = _shown(cell, inputs)
    device = best_device()  # Lightning leaves the module on the CPU
    tokenizer = load_tokenizer(inputs.tokenizer.weights, inputs.tokenizer.fingerprint).to(device)
    drawn = sample(
        module.model.to(device),
        tokenizer,
        shown_R.to(device).repeat_interleave(evaluation.samples_per_class, dim=0),
        cfg=evaluation.guidance,
        top_k=evaluation.top_k,
        top_p=evaluation.top_p,
        seed=cell.trunk.seed,
    )
    path = files.picture("samples")
    save_pictures(drawn.images, path, evaluation.samples_per_class)
    return (path.name,)


def _shown(cell: Cell, inputs: Inputs) -> torch.Tensor:
    """The first classes, or captions of validation images, one for each row of the picture of samples."""
    rows, captions = cell.trunk.experiment.evaluation.sample_classes, _validation_captions(cell, inputs)
    if captions is None:
        return torch.arange(min(rows, cell.trunk.model.num_classes))
    return captions.of_images(captions.different(rows))


def _validation_captions(cell: Cell, inputs: Inputs) -> StoredCaptions | None:
    """Those of the validation images, where the cell is told captions."""
    return None if cell.trunk.model.text_width is None else StoredCaptions.read_required(inputs.tokens.validation)


def _captions_record(cell: Cell, inputs: Inputs) -> CaptionsRecord | None:
    settings, captions = cell.trunk.experiment.data.captions, _validation_captions(cell, inputs)
    if settings is None or captions is None:
        return None
    shown = captions.texts_of(captions.different(cell.trunk.experiment.evaluation.sample_classes))
    return CaptionsRecord(
        settings=settings.model_dump(mode="json"), identity=open_encoder(settings).identity, shown=tuple(shown)
    )
