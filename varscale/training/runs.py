"""Trunk and cell runs of a transformer: from settings to checkpoints, metrics and result files."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from varscale.data.loading import EvaluationBatches, StepBatches
from varscale.data.tokens.store import TokenStore
from varscale.errors import Diverged
from varscale.generation.pictures import save_pictures
from varscale.generation.sampling import sample
from varscale.numerics.device import best_device, deterministic
from varscale.store.layout import RunFiles, TokenFiles, read_json, write_json
from varscale.store.weights import save_model
from varscale.tokenizer.storage import load_tokenizer
from varscale.tokenizer.training import Report
from varscale.training.callbacks import Checkpoints, Progress, ScheduleCallback, Throughput
from varscale.training.cells import Cell, Numerics, Trunk
from varscale.training.execution import apply_numerics, check_memory
from varscale.training.module import TokenModelModule
from varscale.training.schedules import Schedule
from varscale.training.trainer import Continuation, Loader, check_intact, make_trainer, read_checkpoint


@dataclass(frozen=True)
class Inputs:
    """What trunks and cells of a sweep share."""

    tokenizer: Path
    """File of the finished tokenizer."""
    tokenizer_fingerprint: str
    tokens: TokenFiles
    tokens_fingerprint: str
    numerics: Numerics
    peak_flops: float
    """Measured matrix-multiply peak of a worker, FLOPs a second."""


def train_trunk(trunk: Trunk, milestones: Sequence[int], files: RunFiles, inputs: Inputs, report: Report) -> None:
    """Train a trunk until every milestone (images seen) has its checkpoint.

    Starts from the furthest checkpoint that lies before the first missing milestone.

    Raises:
        Diverged: the loss is not finite; the milestones before that are kept.
    """
    missing = sorted(images for images in milestones if not files.milestone(images).exists())
    if not missing:
        return
    fingerprint = trunk.fingerprint(inputs.tokens_fingerprint, inputs.numerics)
    files.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(files.lock):
        _train_trunk(trunk, milestones, missing, files, inputs, fingerprint, report)


def _train_trunk(
    trunk: Trunk,
    milestones: Sequence[int],
    missing: Sequence[int],
    files: RunFiles,
    inputs: Inputs,
    fingerprint: str,
    report: Report,
) -> None:
    _write_identity(files, "trunk", f"depth {trunk.depth} · trunk · seed {trunk.seed}", fingerprint, _describe(trunk))
    resume = _latest([*files.milestones, files.last_checkpoint], missing[0], fingerprint, trunk)
    schedule = _schedule(trunk, None, 0)
    paths = {images: files.milestone(images) for images in milestones}
    _fit(trunk, files, inputs, fingerprint, schedule, missing[-1], resume, paths, report)
    files.last_checkpoint.unlink(missing_ok=True)  # the last milestone is the same


def train_cell(cell: Cell, trunk_files: RunFiles | None, files: RunFiles, inputs: Inputs, report: Report) -> None:
    """Train a cell from its trunk's checkpoint (or, without trunk, from the start), measure it, write its result last.

    Raises:
        Diverged: the loss is not finite.
    """
    fingerprint = cell.fingerprint(inputs.tokens_fingerprint, inputs.numerics)
    files.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(files.lock):
        if not files.finished(fingerprint):
            _train_cell(cell, trunk_files, files, inputs, fingerprint, report)


def _train_cell(
    cell: Cell, trunk_files: RunFiles | None, files: RunFiles, inputs: Inputs, fingerprint: str, report: Report
) -> None:
    started = time.time()
    trunk = cell.trunk
    _write_identity(files, "cell", cell.title, fingerprint, cell.parameters())
    start = _latest([files.last_checkpoint], cell.images, fingerprint, trunk)
    if start is None and trunk_files is not None:
        start = trunk_files.milestone(cell.branch_images)
        if not start.exists():
            raise ValueError(f"{start}: the trunk's checkpoint is missing; run the sweep again to make it anew")
        read_checkpoint(start, trunk.fingerprint(inputs.tokens_fingerprint, inputs.numerics))
    module, speed = _fit(trunk, files, inputs, fingerprint, _schedule_of(cell), cell.images, start, {}, report)
    figures = {**_evaluate(module, cell, inputs), **speed}
    if not math.isfinite(figures["loss"]):
        raise Diverged(f"after the last step the validation loss is {figures['loss']}")
    pictures = _draw_samples(module, cell, inputs, files)
    save_model(files.weights, module.var, fingerprint)
    seconds = time.time() - started
    write_json(files.result, cell_result(cell, inputs, fingerprint, "finished", figures, seconds, pictures))
    files.last_checkpoint.unlink(missing_ok=True)


def record_divergence(cell: Cell, files: RunFiles, inputs: Inputs, reason: str) -> None:
    """Write the result of a cell that diverged, in its trunk or its branch."""
    fingerprint = cell.fingerprint(inputs.tokens_fingerprint, inputs.numerics)
    _write_identity(files, "cell", cell.title, fingerprint, cell.parameters())
    write_json(files.result, {**cell_result(cell, inputs, fingerprint, "diverged", {}, 0.0, []), "reason": reason})


def cell_result(
    cell: Cell,
    inputs: Inputs,
    fingerprint: str,
    status: str,
    figures: Mapping[str, float],
    wall_seconds: float,
    pictures: Sequence[str],
) -> dict[str, Any]:
    """A result file's content: `row` has the columns of the runs table, `metrics` its numbers for dashboards."""
    summary = read_json(inputs.tokens.summary) or {}
    row = {
        "run": f"{cell.name}-{fingerprint[:8]}",
        **cell.parameters(),
        "unique_images": summary.get("images"),
        "epochs": cell.images / summary["images"] if summary else None,
        **figures,
        "unigram_entropy": summary.get("unigram_entropy"),
        "tokenizer": inputs.tokenizer_fingerprint,
        "fingerprint": fingerprint,
        "status": status,
        "wall_seconds": wall_seconds,
        "precision": inputs.numerics.precision,
        "compiled": inputs.numerics.compiled,
        "native_kernels": inputs.numerics.native_kernels,
        "threads": inputs.numerics.threads,
        "images_at_once": cell.trunk.images_at_once(inputs.numerics),
    }
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return {
        "fingerprint": fingerprint,
        "status": status,
        "time": time.time(),
        "metrics": numbers,
        "pictures": list(pictures),
        "row": row,
    }


def _fit(
    trunk: Trunk,
    files: RunFiles,
    inputs: Inputs,
    fingerprint: str,
    schedule: Schedule,
    total_images: int,
    resume: Path | None,
    milestones: Mapping[int, Path],
    report: Report,
) -> tuple[TokenModelModule, dict[str, float]]:
    """Train up to `total_images`; the module, and how fast it went."""
    experiment, batch = trunk.experiment, trunk.batch_size
    runtime = experiment.runtime
    module = _module(trunk, inputs)
    seen = 0
    if resume is not None:
        check_intact(resume)
        seen = int(torch.load(resume, map_location="cpu", weights_only=True, mmap=True)["state_dict"]["steps"]) * batch
    if seen >= total_images:
        assert resume is not None
        module.load_state_dict(torch.load(resume, map_location="cpu", weights_only=True)["state_dict"])
        return module, {}
    store = TokenStore.open(inputs.tokens.train, inputs.tokenizer_fingerprint)
    batches = Loader(
        StepBatches(
            store,
            seed=trunk.seed,
            batch_size=batch,
            start_step=seen // batch,
            num_steps=(total_images - seen) // batch,
        )
    )
    executed_flops = trunk.shape.executed_training_flops()
    throughput = Throughput(batch, runtime.log_every_steps, executed_flops, inputs.peak_flops, lambda: batches.seconds)
    callbacks = [
        Continuation(fingerprint),
        ScheduleCallback(schedule),
        throughput,
        Checkpoints(files.last_checkpoint, runtime.checkpoint_seconds, milestones),
        Progress(lambda images: report(images, total_images)),
    ]
    trainer = make_trainer(files, batch, callbacks, precision=inputs.numerics.precision)
    with deterministic():
        trainer.fit(module, batches, ckpt_path=resume, weights_only=True)
    return module, throughput.figures


def _module(trunk: Trunk, inputs: Inputs) -> TokenModelModule:
    experiment, shape = trunk.experiment, trunk.shape
    apply_numerics(inputs.numerics, shape.width // shape.heads)
    images = trunk.images_at_once(inputs.numerics)
    check_memory(shape.step_bytes(images, element_bytes=inputs.numerics.element_bytes), "runtime.micro_batch")
    model, optim = experiment.model, experiment.optim
    return TokenModelModule(
        str(inputs.tokenizer),
        shape.num_classes,
        shape.depth,
        shape.width,
        shape.heads,
        mlp_ratio=shape.mlp_ratio,
        drop_path_rate=model.drop_path_rate(trunk.depth),
        shared_adaln=shape.shared_adaln,
        normalise_queries_keys=model.normalise_queries_keys,
        adaln_init=model.adaln_init,
        adaln_gamma_init=model.adaln_gamma_init,
        head_init=model.head_init,
        batch_size=optim.batch_size,
        lr=optim.peak_lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        grad_clip=optim.grad_clip,
        label_dropout=model.label_dropout,
        seed=trunk.seed,
        compile_blocks=inputs.numerics.compiled,
        images_at_once=images,
        log_every_steps=experiment.runtime.log_every_steps,
    )


def _schedule(trunk: Trunk, total_images: int | None, decay_images: int) -> Schedule:
    optim = trunk.experiment.optim
    return Schedule(
        optim.schedule,
        optim.peak_lr,
        optim.batch_size,
        trunk.warmup_images,
        total_images,
        decay_images if optim.schedule == "wsd" else 0,
        optim.final_lr_ratio,
        optim.weight_decay,
        optim.final_weight_decay if optim.schedule == "linear" else None,
    )


def _schedule_of(cell: Cell) -> Schedule:
    return _schedule(cell.trunk, cell.images, cell.decay_images)


def _latest(paths: Sequence[Path], before_or_at: int, fingerprint: str, trunk: Trunk) -> Path | None:
    """The existing checkpoint that is furthest, but not beyond `before_or_at` images."""
    reached = {}
    for path in paths:
        if path.exists():
            images = int(read_checkpoint(path, fingerprint)["state_dict"]["steps"]) * trunk.batch_size
            if images <= before_or_at:
                reached[path] = images
    return max(reached, key=lambda path: reached[path], default=None)


def _evaluate(module: TokenModelModule, cell: Cell, inputs: Inputs) -> dict[str, float]:
    """Loss and error on the whole validation set, without label dropout."""
    store = TokenStore.open(inputs.tokens.validation, inputs.tokenizer_fingerprint)
    batches = EvaluationBatches(store, batch_size=cell.trunk.experiment.evaluation.batch_size)
    trainer = make_trainer(inputs.tokens, 1, [], precision=inputs.numerics.precision)
    module.prediction.reset()
    with deterministic():
        trainer.validate(module, Loader(batches), verbose=False)
    return module.prediction.compute()


def _draw_samples(module: TokenModelModule, cell: Cell, inputs: Inputs, files: RunFiles) -> list[str]:
    """A grid of samples, a row a class."""
    evaluation = cell.trunk.experiment.evaluation
    classes = min(evaluation.sample_classes, cell.trunk.shape.num_classes)
    if evaluation.samples_per_class == 0:
        return []
    device = best_device()  # Lightning leaves the module on the CPU
    tokenizer = load_tokenizer(inputs.tokenizer, inputs.tokenizer_fingerprint).to(device)
    labels_B = torch.arange(classes, device=device).repeat_interleave(evaluation.samples_per_class)
    drawn = sample(
        module.var.to(device),
        tokenizer,
        labels_B,
        cfg=evaluation.guidance,
        top_k=evaluation.top_k,
        top_p=evaluation.top_p,
        seed=cell.trunk.seed,
    )
    path = files.picture("samples")
    save_pictures(drawn.images, path, evaluation.samples_per_class)
    return [path.name]


def _describe(trunk: Trunk) -> dict[str, Any]:
    described = trunk.cell(trunk.smallest_budget).parameters()
    only_of_cells = ("budget_flops", "train_flops", "images_seen", "tokens_seen", "steps")
    return {name: value for name, value in described.items() if name not in only_of_cells}


def _write_identity(files: RunFiles, role: str, name: str, fingerprint: str, params: Mapping[str, Any]) -> None:
    write_json(files.identity, {"name": name, "role": role, "fingerprint": fingerprint, "params": dict(params)})
