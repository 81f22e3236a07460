"""One tokenizer run, and the token stores that it makes: from an experiment to files."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from varscale.config import Experiment, TokenizerConfig, TokenizerTraining
from varscale.data.loading import ImageBatches, load_ahead
from varscale.data.sources.base import ImageSource, Pixels
from varscale.data.sources.of_experiment import training_source, validation_source
from varscale.data.tokens.store import TokenStore, unigram_entropy
from varscale.data.tokens.writer import encode_store
from varscale.data.transforms import to_model_range
from varscale.errors import TokenStoreError
from varscale.evaluation.reconstruction import ReconstructionMeter
from varscale.families.var.config import TokenizerShape
from varscale.generation.pictures import save_pictures
from varscale.numerics.device import best_device, deterministic
from varscale.official.files import read_tokenizer
from varscale.store.fingerprint import processors
from varscale.store.layout import RunFiles, TokenFiles, write_json
from varscale.store.weights import load_tokenizer, save_model
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.module import TokenizerModule
from varscale.training.callbacks import Checkpoints, Progress
from varscale.training.execution import check_memory
from varscale.training.trainer import Continuation, Loader, check_intact, make_trainer, read_checkpoint

Report = Callable[[int, int], None]
"""Called with the images done and in all."""

_PICTURES = 8
_MOST_LOADING_THREADS = 32
"""Each keeps a batch of images in memory."""


def train_tokenizer(experiment: Experiment, files: RunFiles, fingerprint: str, report: Report) -> None:
    """Train (or go on training, or import) the experiment's tokenizer, measure it, and write its files; result last."""
    files.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(files.lock):
        if not files.has_tokenizer(fingerprint):
            _train_tokenizer(experiment, files, fingerprint, report)


def _train_tokenizer(experiment: Experiment, files: RunFiles, fingerprint: str, report: Report) -> None:
    started = time.time()
    settings = experiment.tokenizer
    write_json(
        files.identity,
        {
            "name": f"tokenizer · {settings.vocab_size} codes · {settings.tokens_per_image} tokens",
            "role": "tokenizer",
            "fingerprint": fingerprint,
            "params": settings.model_dump(mode="json", exclude={"training"})
            | settings.training.model_dump(mode="json"),
        },
    )
    validation = validation_source(experiment.data)
    trained = 0 if settings.checkpoint is not None else _steps(settings.training) * settings.training.batch_size

    def report_images(images: int) -> None:
        report(images, trained + len(validation))

    if settings.checkpoint is not None:
        tokenizer = _imported(Path(settings.checkpoint), settings)
    else:
        tokenizer = _saved(files, fingerprint) or _fit(experiment, files, fingerprint, report_images).averaged
    save_model(files.tokenizer_checkpoint, tokenizer, fingerprint)
    figures = _measure(
        settings, tokenizer, validation, files.picture("reconstructions"), lambda done: report_images(trained + done)
    )
    write_json(
        files.result,
        {
            "fingerprint": fingerprint,
            "status": "finished",
            "time": time.time(),
            "metrics": {**figures, "wall_seconds": time.time() - started},
            "pictures": ["reconstructions.png"],
        },
    )
    files.last_checkpoint.unlink(missing_ok=True)


def encode_tokens(
    experiment: Experiment,
    tokenizer_files: RunFiles,
    tokenizer: str,
    files: TokenFiles,
    train_images: int,
    report: Report,
) -> None:
    """Encode the validation images and `train_images` training images (all, of a stored data set).

    Damaged shards of earlier calls are made anew, and a store never shrinks.
    """
    train_images = max(train_images, files.images)
    model = load_tokenizer(tokenizer_files.tokenizer_checkpoint, tokenizer)
    device = best_device()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stub lacks it

    def encode(images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        with deterministic():
            return model.encode(images_B3HW.to(device, memory_format=torch.channels_last))

    train = training_source(experiment.data, train_images)
    stores = [(files.validation, validation_source(experiment.data), 1), (files.train, train, experiment.data.views)]
    total = sum(len(source) * views for _, source, views in stores)
    done = 0
    for folder, source, views in stores:
        before = done
        encode_store(
            folder,
            source,
            encode,
            patch_nums=model.patch_nums,
            vocab_size=model.vocab_size,
            tokenizer_fingerprint=tokenizer,
            views=views,
            batch_size=experiment.tokenizer.encode_batch_size,
            workers=_loading_threads(),
            progress=lambda finished, _, before=before: report(before + finished, total),  # type: ignore[misc]
        )
        done += len(source) * views
    if files.images != len(train):
        first_views = TokenStore.open(files.train, views=1, verify="sizes")
        write_json(files.summary, {"images": len(train), "unigram_entropy": unigram_entropy(first_views).mean})


def tokens_ready(files: TokenFiles, train_images: int) -> bool:
    """Whether intact stores of so many training images are there."""
    if files.images < train_images:
        return False
    try:
        for folder in (files.validation, files.train):
            TokenStore.open(folder)
    except TokenStoreError:
        return False
    return True


def _saved(files: RunFiles, fingerprint: str) -> MultiScaleTokenizer | None:
    """A trained tokenizer whose measurement was interrupted."""
    try:
        return load_tokenizer(files.tokenizer_checkpoint, fingerprint)
    except (OSError, ValueError):
        return None


def _steps(training: TokenizerTraining) -> int:
    return max(1, round(training.images / training.batch_size))


def _fit(experiment: Experiment, files: RunFiles, fingerprint: str, report: Callable[[int], None]) -> TokenizerModule:
    settings, training = experiment.tokenizer, experiment.tokenizer.training
    steps = _steps(training)
    module = TokenizerModule(
        **settings.architecture,
        total_images=steps * training.batch_size,
        **training.model_dump(exclude={"images"}),
        log_every_steps=experiment.runtime.log_every_steps,
    )
    needed = TokenizerShape.of(module.tokenizer).step_bytes(training.micro_batch or training.batch_size)
    check_memory(needed, "tokenizer.training.micro_batch")
    start_step, resume = 0, None
    if files.last_checkpoint.exists():
        checkpoint = read_checkpoint(files.last_checkpoint, fingerprint)
        check_intact(files.last_checkpoint)
        start_step, resume = int(checkpoint["state_dict"]["steps"]), files.last_checkpoint
    if start_step >= steps:
        module.load_state_dict(checkpoint["state_dict"])
        return module
    batches = ImageBatches(
        training_source(experiment.data, steps * training.batch_size),
        seed=training.seed,
        batch_size=training.batch_size,
        start_step=start_step,
        num_steps=steps - start_step,
        workers=_loading_threads(),
    )
    callbacks = [
        Continuation(fingerprint),
        Checkpoints(files.last_checkpoint, experiment.runtime.checkpoint_seconds, {}),
        Progress(report),
    ]
    trainer = make_trainer(files, training.batch_size, callbacks, precision="float32")
    with deterministic():
        trainer.fit(module, Loader(batches), ckpt_path=resume, weights_only=True)
    return module


def _loading_threads() -> int:
    """Many where a GPU does the rest; beside a tokenizer on the processors one is enough."""
    return min(processors(), _MOST_LOADING_THREADS) if best_device().type == "cuda" else 1


def _imported(path: Path, settings: TokenizerConfig) -> MultiScaleTokenizer:
    tokenizer = read_tokenizer(path, settings.patch_nums)
    for name in ("patch_nums", "vocab_size", "latent_channels"):
        found, expected = getattr(tokenizer, name), getattr(settings, name)
        if found != expected:
            raise ValueError(f"{path}: {name} is {found}, but tokenizer.{name} says {expected}")
    if tokenizer.downsampling != 2 ** (len(settings.channel_multipliers) - 1):
        raise ValueError(
            f"{path}: it shrinks images by {tokenizer.downsampling}, but tokenizer.channel_multipliers has "
            f"{len(settings.channel_multipliers)} entries, which says {2 ** (len(settings.channel_multipliers) - 1)}"
        )
    return tokenizer


@torch.no_grad()
def _measure(
    settings: TokenizerConfig,
    tokenizer: MultiScaleTokenizer,
    source: ImageSource,
    picture: Path,
    report: Callable[[int], None],
) -> dict[str, float]:
    """Figures on the whole validation set, and a picture: originals above, reconstructions below."""
    device = best_device()
    meter = ReconstructionMeter(len(tokenizer.patch_nums), tokenizer.vocab_size).to(device)
    tokenizer.to(device).eval()
    starts = range(0, len(source), settings.encode_batch_size)

    def load(start: int) -> Pixels:
        indices = range(start, min(start + settings.encode_batch_size, len(source)))
        return source.load_batch(indices, [0] * len(indices))[0]

    shown_B3HW = None
    for start, pixels_B3HW in zip(starts, load_ahead(load, starts, _loading_threads()), strict=True):
        images_B3HW = to_model_range(pixels_B3HW).to(device)
        meter.update(tokenizer, images_B3HW)
        shown_B3HW = images_B3HW[:_PICTURES] if shown_B3HW is None else shown_B3HW
        report(start + len(images_B3HW))
    assert shown_B3HW is not None
    pair = torch.cat((shown_B3HW, tokenizer.decode(tokenizer.encode(shown_B3HW))))
    save_pictures((pair + 1) / 2, picture, len(shown_B3HW))
    return meter.compute()
