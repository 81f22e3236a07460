"""Tokenizer runs: resuming to the bit, results, tokens, and checkpoints that don't belong.

Letters: B batch, L tokens of an image.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from tiny_training import Killed, checkpoint_every, ignore, kill_at, little_experiment, points, report_every_step

from varscale.config import Experiment
from varscale.data.sources.of_experiment import training_source, validation_source
from varscale.data.tokens.store import TokenStore, unigram_bit_entropy, unigram_entropy
from varscale.data.transforms import to_model_range
from varscale.errors import Diverged
from varscale.official.files import export_checkpoint, read_tokenizer
from varscale.store.layout import RunFiles, TokenFiles
from varscale.store.records import Result, RunIdentity, TokensSummary, read_result
from varscale.tokenizer import training as tokenizer_run
from varscale.tokenizer.autoencoder import MultiScaleTokenizer
from varscale.tokenizer.storage import load_tokenizer, save_tokenizer
from varscale.tokenizer.training import encode_tokens, tokenizer_ready, train_tokenizer

TRAINING: dict[str, Any] = {
    "images": 20 * 8,
    "batch_size": 8,
    "lr": 3e-3,
    "warmup_images": 16,
    "quantize_after": 0.2,
    "restart_every_steps": 3,
    "restart_usage": 1.0,  # about half of the codes each time, so that a lost count would show
}
ADVERSARIAL = {"adversarial_weight": 0.3, "adversarial_start": 0.4, "discriminator_channels": 4}


def experiment(**training: Any) -> Experiment:
    if "adversarial_weight" not in training:
        return little_experiment(tokenizer={"training": TRAINING | training})
    larger = {"patch_nums": (1, 2, 6), "channel_multipliers": (1, 1, 2)}  # the discriminator needs 24 px
    return little_experiment(tokenizer={**larger, "training": TRAINING | training}, data={"image_size": 24})


def run_in(folder: Path, fingerprint: str = "printa") -> RunFiles:
    return RunFiles(folder / f"tokenizer-{fingerprint}")


def copied(run: RunFiles, folder: Path, fingerprint: str = "printa") -> RunFiles:
    return RunFiles(Path(shutil.copytree(run.folder, run_in(folder, fingerprint).folder)))


def result_of(files: RunFiles) -> Result:
    result = read_result(files)
    assert result is not None
    return result


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    return load_tokenizer(files.weights).state_dict()


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    report_every_step(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run that nothing interrupted."""
    files = run_in(tmp_path_factory.mktemp("straight"))
    train_tokenizer(experiment(), files, ignore)
    return files


# before codes exist, at the step that makes them, between restarts, and in the last fifth
@pytest.mark.parametrize(("every", "last"), [(2, 3), (4, 4), (5, 13), (9, 19)])
def test_goes_on_to_the_bit(
    straight: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, last: int
) -> None:
    files = run_in(tmp_path)
    checkpoint_every(monkeypatch, every)
    with pytest.raises(Killed):
        train_tokenizer(experiment(), files, kill_at(last * 8))
    assert files.last_checkpoint.exists()
    assert read_result(files) is None
    train_tokenizer(experiment(), files, ignore)
    ours, theirs = weights(files), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures = [{k: v for k, v in result_of(run).metrics.items() if k != "wall_seconds"}
               for run in (files, straight)]  # fmt: skip
    assert figures[0] == figures[1]
    losses = [[(point.images, point.metrics["train_loss"]) for point in points(run)] for run in (files, straight)]
    assert losses[0] == losses[1]
    assert [images for images, _ in losses[0]] == [40, 80, 120, 160]
    assert not files.last_checkpoint.exists()


def test_goes_on_to_the_bit_with_a_discriminator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = experiment(**ADVERSARIAL)
    whole, killed = run_in(tmp_path / "whole"), run_in(tmp_path / "killed")
    train_tokenizer(settings, whole, ignore)
    checkpoint_every(monkeypatch, 6)
    for last in (7, 14):  # before and after the adversarial term sets in at step 8
        with pytest.raises(Killed):
            train_tokenizer(settings, killed, kill_at(last * 8))
    train_tokenizer(settings, killed, ignore)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    adversarial = [("train_discriminator" in point.metrics) for point in points(killed)]
    assert adversarial == [False, True, True, True]


def test_killed_after_the_last_step(straight: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = run_in(tmp_path)
    checkpoint_every(monkeypatch, 1)
    with pytest.raises(Killed):
        train_tokenizer(experiment(), files, kill_at(160))
    train_tokenizer(experiment(), files, kill_at(8))
    ours, theirs = weights(files), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_result(straight: RunFiles) -> None:
    """Figures are of the averaged weights that were saved, on the whole validation set."""
    result = result_of(straight)
    assert (result.fingerprint, result.status) == ("printa", "finished")
    tokenizer = load_tokenizer(straight.weights, "printa")
    source = validation_source(experiment().data)
    assert len(source) == 40
    images_B3HW = to_model_range(source.load_batch(list(range(40)), [0] * 40)[0])
    with torch.no_grad():
        error = (tokenizer.decode(tokenizer.encode(images_B3HW)) - images_B3HW).square().mean()
    assert result.metrics["mean_squared_error"] == pytest.approx(float(error), rel=1e-4)
    assert straight.picture("reconstructions").read_bytes().startswith(b"\x89PNG")
    identity = RunIdentity.read(straight.identity)
    assert identity is not None
    assert identity.role == "tokenizer"


def test_finished_is_finished(straight: RunFiles) -> None:
    train_tokenizer(experiment(), straight, kill_at(8))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run that was killed after its sixth step, with a checkpoint of the fifth."""
    files = run_in(tmp_path_factory.mktemp("interrupted"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        report_every_step(monkeypatch)
        checkpoint_every(monkeypatch, 1)
        with pytest.raises(Killed):
            train_tokenizer(experiment(), files, kill_at(6 * 8))
    return files


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"",
        lambda whole: b"no checkpoint",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-10],
        lambda whole: flipped(whole, 70),  # in the pickle
        lambda whole: flipped(whole, len(whole) // 2),  # in the weights
        lambda whole: flipped(whole, len(whole) - 30),  # in the directory's end
    ],
)
def test_an_unusable_checkpoint_is_named_and_the_run_made_anew(
    straight: RunFiles,
    interrupted: RunFiles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[bytes], bytes],
) -> None:
    files = copied(interrupted, tmp_path)
    files.last_checkpoint.write_bytes(spoil(files.last_checkpoint.read_bytes()))
    train_tokenizer(experiment(), files, ignore)
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("varscale")]
    assert warning.startswith(f"{files.last_checkpoint}: not a usable checkpoint (")
    assert warning.endswith("; the run is made anew from what lies before it")
    ours, theirs = weights(files), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [point.images for point in points(files)] == [40, 80, 120, 160]


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(
    interrupted: RunFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = copied(interrupted, tmp_path, "printb")
    train_tokenizer(experiment(), files, ignore)
    assert "not a usable checkpoint (it was written by another run, printa)" in caplog.text
    assert read_result(files) is not None


def test_a_damaged_tokenizer_is_named_and_made_anew(
    straight: RunFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = copied(straight, tmp_path)
    assert tokenizer_ready(files)
    content = files.weights.read_bytes()
    files.weights.write_bytes(flipped(content, len(content) // 2))
    assert not tokenizer_ready(files)
    caplog.clear()
    train_tokenizer(experiment(), files, ignore)
    assert f"the tokenizer is made anew: {files.weights}: damaged" in caplog.text
    assert files.weights.read_bytes() == content


def test_divergence(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train_tokenizer(experiment(lr=1e30, grad_clip=1e30), run_in(tmp_path), ignore)


def test_a_finished_tokenizer_can_be_taken(straight: RunFiles, tmp_path: Path) -> None:
    settings = little_experiment(tokenizer={"checkpoint": str(straight.weights)})
    files = run_in(tmp_path / "run", "printc")
    train_tokenizer(settings, files, kill_at(8))
    ours, theirs = load_tokenizer(files.weights, "printc").state_dict(), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_tokenizer_whose_file_is_gone_is_made_anew(straight: RunFiles, tmp_path: Path) -> None:
    """As the message about a damaged one asks for."""
    files = copied(straight, tmp_path)
    files.weights.unlink()
    train_tokenizer(experiment(), files, ignore)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(weights(files).values(), weights(straight).values(), strict=True)
    )


def test_a_tokenizer_that_does_not_fit_is_named(straight: RunFiles, tmp_path: Path) -> None:
    brought = {"checkpoint": str(straight.weights)}
    for changes, message in (
        ({"vocab_size": 32}, r"weights\.safetensors: vocab_size is 16, but tokenizer\.vocab_size says 32"),
        ({"patch_nums": (1, 4)}, r"patch_nums is \(1, 2, 4\), but tokenizer\.patch_nums says \(1, 4\)"),
        ({"patch_nums": (1, 8), "channel_multipliers": (1,)}, "patch_nums is"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(little_experiment(tokenizer=brought | changes), run_in(tmp_path), ignore)


def test_the_references_tokenizer_can_be_taken(straight: RunFiles, tmp_path: Path) -> None:
    """Exported and brought back, by whatever name; a torn file is named."""
    full_size = MultiScaleTokenizer(architecture((1, 2), 16, 4, 32))  # the reference's settings but for the sizes
    save_tokenizer(tmp_path / "ours", full_size, "printa")
    theirs = tmp_path / "vae.safetensors"
    export_checkpoint(tmp_path / "ours", theirs)
    taken = read_tokenizer(theirs, (1, 2)).state_dict()
    assert all(torch.equal(taken[name], tensor) for name, tensor in full_size.state_dict().items())
    theirs.write_bytes(theirs.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"vae\.safetensors: not a checkpoint of FoundationVision/VAR"):
        read_tokenizer(theirs, (1, 2))


def test_tokens_are_the_tokenizers(straight: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # windows of 4096 images are what training wants; a test has no time for that many
    monkeypatch.setattr(tokenizer_run, "training_source", lambda data, images: training_source_of(data, images))
    told: list[tuple[int, int]] = []
    encode_tokens(experiment(), straight, TokenFiles(tmp_path), 300, lambda done, total: told.append((done, total)))
    assert told[-1] == (340, 340)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    tokenizer = load_tokenizer(straight.weights)
    for split, source in (("train", training_source_of(experiment().data, 300)),
                          ("validation", validation_source(experiment().data))):  # fmt: skip
        store = TokenStore.open(tmp_path / split, "printa")
        assert len(store) == len(source)
        pixels, labels = source.load_batch(list(range(30)), [0] * 30)
        tokens_BL, labels_B = store.tokens(torch.arange(30))
        expected_BL = torch.cat(tokenizer.encode(to_model_range(pixels)), dim=1)
        assert (tokens_BL == expected_BL).float().mean() > 0.99  # other batch sizes can round otherwise
        assert labels_B.tolist() == labels.tolist()
    summary = TokensSummary.read(tmp_path / "summary.json")
    assert summary is not None
    assert summary.images == 300
    assert summary.unigram_entropy == pytest.approx(unigram_entropy(TokenStore.open(tmp_path / "train")))


def test_bitwise_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From training to the store; interrupted or not, to the bit."""
    monkeypatch.setattr(tokenizer_run, "training_source", lambda data, images: training_source_of(data, images))
    bits = {"quantizer": "bitwise", "latent_channels": 5, "vocab_size": 32, "training": TRAINING}
    described, files, killed = little_experiment(tokenizer=bits), run_in(tmp_path / "a"), run_in(tmp_path / "b")
    train_tokenizer(described, files, ignore)
    checkpoint_every(monkeypatch, 5)
    with pytest.raises(Killed):
        train_tokenizer(described, killed, kill_at(13 * 8))
    train_tokenizer(described, killed, ignore)
    assert all(torch.equal(tensor, weights(killed)[name]) for name, tensor in weights(files).items())
    assert 0 < result_of(files).metrics["bit_entropy_scale_3"] <= 1
    assert result_of(files).metrics["train_flops"] > 0
    encode_tokens(described, files, TokenFiles(tmp_path / "tokens"), 100, ignore)
    store, summary = (
        TokenStore.open(tmp_path / "tokens" / "train"),
        TokensSummary.read(tmp_path / "tokens/summary.json"),
    )
    assert summary is not None
    assert summary.unigram_entropy is not None
    assert summary.unigram_bit_entropy == pytest.approx(unigram_bit_entropy(store, 5))
    assert summary.unigram_bit_entropy >= summary.unigram_entropy
    assert int(store.tokens(torch.arange(100)).tokens_BL.max()) < 32


def training_source_of(data: Any, images: int) -> Any:
    """As many images as asked for, not whole windows."""
    whole = training_source(data, images)
    whole.num_images = images
    return whole
