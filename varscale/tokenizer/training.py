"""One tokenizer run, and the token stores that it makes: from an experiment to files."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from varscale.config import Experiment, TokenizerConfig
from varscale.data.loading import ImageBatches, load_ahead, whole_windows
from varscale.data.sources.base import ImageSource, Pixels
from varscale.data.sources.of_experiment import training_source, validation_source
from varscale.data.tokens.captions import write_captions
from varscale.data.tokens.store import TokenStore, channel_statistics, unigram_bit_entropy, unigram_entropy
from varscale.data.tokens.writer import encode_store
from varscale.data.transforms import to_model_range
from varscale.errors import CheckpointError, TokenStoreError
from varscale.evaluation.reconstruction import ReconstructionMeter
from varscale.evaluation.verdict import tokenizer_faults
from varscale.generation.pictures import save_pictures
from varscale.numerics.device import best_device, deterministic
from varscale.numerics.machine import device_name, processors, versions
from varscale.official.files import read_tokenizer
from varscale.store.layout import RunFiles, TokenFiles
from varscale.store.records import Result, RunIdentity, TokensSummary, encoded_images, read_result
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.module import TokenizerModule
from varscale.tokenizer.shape import TokenizerShape
from varscale.tokenizer.storage import load_tokenizer, save_tokenizer
from varscale.training.callbacks import Checkpoints, ProgressCallback
from varscale.training.execution import check_memory
from varscale.training.interruption import Report
from varscale.training.trainer import Continuation, Loader, make_trainer, remove_checkpoint, usable_checkpoint

_PICTURES = 8
_MOST_LOADING_THREADS = 32
"""Each keeps a batch of images in memory."""
_log = logging.getLogger(__name__)


def train_tokenizer(experiment: Experiment, files: RunFiles, report: Report) -> None:
    """Train (or go on training, or import) the experiment's tokenizer, measure it, and write its files; result last.

    A checkpoint or a finished tokenizer that can't be read is named in a warning and made anew.

    Raises:
        CheckpointError: the file of `tokenizer.checkpoint` can't be used.
        Diverged: the loss is not finite.
    """
    with files.locked():
        tokenizer = _trained(files)
        if tokenizer is not None and _measured(files):
            return
        started = time.time()
        settings = experiment.tokenizer
        described = settings.model_dump(mode="json", exclude={"accept", "training"})
        described |= settings.training.model_dump(mode="json")
        name = f"tokenizer · {settings.vocab_size} codes · {settings.tokens_per_image} tokens"
        RunIdentity(name=name, role="tokenizer", params=described).write(files.identity)
        validation = validation_source(experiment.data)
        trained_images = settings.training.total_images if settings.checkpoint is None else 0

        def report_images(images: int) -> None:
            report(images, trained_images + len(validation))

        if tokenizer is None and settings.checkpoint is not None:
            tokenizer = _imported(Path(settings.checkpoint), settings)
        elif tokenizer is None:
            tokenizer = _train(experiment, files, report_images)
        save_tokenizer(files.weights, tokenizer, files.fingerprint)
        picture = files.picture("reconstructions")
        figures = _measure(settings, tokenizer, validation, picture, lambda done: report_images(trained_images + done))
        if settings.checkpoint is None:
            images = min(trained_images, len(training_source(experiment.data, trained_images)))
            figures["feature_vectors"] = float(images * settings.tokens_per_image)
            figures["train_flops"] = TokenizerShape(settings.architecture).training_flops() * trained_images
        shape = TokenizerShape(tokenizer.architecture)
        figures.update(encode_flops=shape.encode_flops(), decode_flops=shape.decode_flops())  # of one image
        figures["faults"] = float(len(tokenizer_faults(figures, settings)))
        Result(
            fingerprint=files.fingerprint,
            status="finished",
            time=time.time(),
            metrics={**figures, "wall_seconds": time.time() - started},
            provenance={"device": device_name(), "threads": torch.get_num_threads(), **versions()},
            pictures=(picture.name,),
        ).write(files.result)
        remove_checkpoint(files.last_checkpoint)


def tokenizer_ready(files: RunFiles) -> bool:
    """Whether a finished, intact tokenizer is there."""
    return _measured(files) and _trained(files) is not None


def encode_tokens(
    experiment: Experiment, tokenizer_files: RunFiles, files: TokenFiles, train_images: int, report: Report
) -> None:
    """Encode the validation images and `train_images` training images (all, of a stored data set).

    The stores hold tokens, or latents where the experiment's models read these. Damaged shards of earlier calls are
    made anew, and a store never shrinks.
    """
    train_images = max(train_images, encoded_images(files))
    model = load_tokenizer(tokenizer_files.weights, tokenizer_files.fingerprint)
    device = best_device()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stub lacks it

    latents = experiment.model.description.reads == "latents"

    def encode(images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        images_B3HW = images_B3HW.to(device, memory_format=torch.channels_last)
        with deterministic():
            return [model.features(images_B3HW)] if latents else model.encode(images_B3HW)

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
            tokenizer_fingerprint=tokenizer_files.fingerprint,
            latent_channels=model.latent_channels if latents else None,
            views=views,
            batch_size=experiment.tokenizer.encode_batch_size,
            workers=loading_threads(),
            progress=lambda finished, _, before=before: report(before + finished, total),  # type: ignore[misc]
        )
        if experiment.data.captions is not None:
            write_captions(folder, source, experiment.data.captions)
        done += len(source) * views
    if encoded_images(files) != len(train):
        # of procedural images as many as every store of them has, so that statistics stay what they are when it grows
        first = whole_windows(1) if latents and train.procedural else None
        first_views = TokenStore.open(files.train, views=1, num_images=first, verify="sizes")
        if latents:
            statistics = channel_statistics(first_views)
            summary = TokensSummary(
                images=len(train), latent_mean=statistics.mean, latent_deviation=statistics.deviation
            )
        else:
            bits = model.latent_channels if model.architecture.quantizer == "bitwise" else 0
            summary = TokensSummary(
                images=len(train),
                unigram_entropy=unigram_entropy(first_views),
                unigram_bit_entropy=unigram_bit_entropy(first_views, bits) if bits else None,
            )
        summary.write(files.summary)


def tokens_ready(files: TokenFiles, train_images: int, *, captioned: bool = False) -> bool:
    """Whether intact stores of so many training images, with their captions where these are wanted, are there."""
    if encoded_images(files) < train_images:
        return False
    try:
        for folder in (files.validation, files.train):
            if TokenStore.open(folder).captions is None and captioned:
                return False
    except TokenStoreError:
        return False
    return True


def _measured(files: RunFiles) -> bool:
    """Whether there are figures that a verdict can rest on; those of earlier versions can't."""
    result = read_result(files)
    return result is not None and "mean_picture_error" in result.metrics


def _trained(files: RunFiles) -> MultiScaleTokenizer | None:
    """The tokenizer that a run has written, whose measurement may have been interrupted."""
    if not files.weights.exists():
        return None
    try:
        return load_tokenizer(files.weights, files.fingerprint)
    except CheckpointError as error:
        _log.warning("the tokenizer is made anew: %s", error)
        return None


def _train(experiment: Experiment, files: RunFiles, report: Callable[[int], None]) -> MultiScaleTokenizer:
    """Train from the start or from the last checkpoint; the averaged tokenizer."""
    settings, training = experiment.tokenizer, experiment.tokenizer.training
    needed = TokenizerShape(settings.architecture).step_bytes(training.micro_batch or training.batch_size)
    check_memory(needed, "tokenizer.training.micro_batch")
    module = TokenizerModule(settings.architecture, training, log_every_steps=experiment.runtime.log_every_steps)
    checkpoint = usable_checkpoint(files.last_checkpoint, files.fingerprint)
    start_step = 0 if checkpoint is None else int(checkpoint["state_dict"]["steps"])
    if checkpoint is not None and start_step >= training.steps:
        module.load_state_dict(checkpoint["state_dict"])
        return module.averaged
    batches = ImageBatches(
        training_source(experiment.data, training.total_images),
        seed=training.seed,
        batch_size=training.batch_size,
        start_step=start_step,
        num_steps=training.steps - start_step,
        workers=loading_threads(),
    )
    callbacks = [
        Continuation(files.fingerprint),
        Checkpoints(files.last_checkpoint, experiment.runtime.checkpoint_seconds, {}),
        ProgressCallback(report),
    ]
    trainer = make_trainer(files, training.batch_size, callbacks, precision="float32")
    with deterministic():
        resume = None if checkpoint is None else files.last_checkpoint
        trainer.fit(module, Loader(batches), ckpt_path=resume, weights_only=True)
    return module.averaged


def loading_threads() -> int:
    """Many where a GPU does the rest; beside a tokenizer on the processors one is enough."""
    return min(processors(), _MOST_LOADING_THREADS) if best_device().type == "cuda" else 1


def _imported(path: Path, settings: TokenizerConfig) -> MultiScaleTokenizer:
    tokenizer = read_tokenizer(path, settings.patch_nums)
    for name in ("quantizer", "patch_nums", "vocab_size", "latent_channels"):
        found, expected = getattr(tokenizer.architecture, name), getattr(settings, name)
        if found != expected:
            raise CheckpointError(f"{path}: {name} is {found}, but tokenizer.{name} says {expected}")
    found, expected = tokenizer.architecture.downsampling, settings.downsampling
    if found != expected:
        raise CheckpointError(
            f"{path}: it shrinks images by {found}, but tokenizer.channel_multipliers has "
            f"{len(settings.channel_multipliers)} entries, which says {expected}"
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
    bits = settings.latent_channels if settings.quantizer == "bitwise" else 0
    meter = ReconstructionMeter(len(tokenizer.patch_nums), tokenizer.vocab_size, bits=bits).to(device)
    tokenizer.to(device).eval()
    starts = range(0, len(source), settings.encode_batch_size)

    def load(start: int) -> Pixels:
        indices = range(start, min(start + settings.encode_batch_size, len(source)))
        return source.load_batch(indices, [0] * len(indices))[0]

    for start, pixels_B3HW in zip(starts, load_ahead(load, starts, loading_threads()), strict=True):
        images_B3HW = to_model_range(pixels_B3HW).to(device)
        meter.update(tokenizer, images_B3HW)
        if start == 0:
            shown_B3HW = images_B3HW[:_PICTURES]
            pair_B3HW = torch.cat((shown_B3HW, tokenizer.decode(tokenizer.encode(shown_B3HW))))
            save_pictures((pair_B3HW + 1) / 2, picture, len(shown_B3HW))
        report(start + len(images_B3HW))
    return meter.compute()
