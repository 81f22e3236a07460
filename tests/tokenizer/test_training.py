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
from varscale.data.tokens.store import TokenStore, unigram_entropy
from varscale.data.transforms import to_model_range
from varscale.errors import Diverged
from varscale.official.files import export_checkpoint, read_tokenizer
from varscale.store.layout import RunFiles, TokenFiles, read_json
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


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    return load_tokenizer(files.tokenizer_checkpoint).state_dict()


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    report_every_step(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run that nothing interrupted."""
    files = RunFiles(tmp_path_factory.mktemp("straight"))
    train_tokenizer(experiment(), files, "print-a", ignore)
    return files


# before codes exist, at the step that makes them, between restarts, and in the last fifth
@pytest.mark.parametrize(("every", "last"), [(2, 3), (4, 4), (5, 13), (9, 19)])
def test_goes_on_to_the_bit(
    straight: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, last: int
) -> None:
    files = RunFiles(tmp_path)
    checkpoint_every(monkeypatch, every)
    with pytest.raises(Killed):
        train_tokenizer(experiment(), files, "print-a", kill_at(last * 8))
    assert files.last_checkpoint.exists()
    assert not files.finished("print-a")
    train_tokenizer(experiment(), files, "print-a", ignore)
    ours, theirs = weights(files), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures = [{k: v for k, v in (run.read_result() or {})["metrics"].items() if k != "wall_seconds"}
               for run in (files, straight)]  # fmt: skip
    assert figures[0] == figures[1]
    losses = [[(point["images"], point["metrics"]["train_loss"]) for point in points(run)] for run in (files, straight)]
    assert losses[0] == losses[1]
    assert [images for images, _ in losses[0]] == [40, 80, 120, 160]
    assert not files.last_checkpoint.exists()


def test_goes_on_to_the_bit_with_a_discriminator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = experiment(**ADVERSARIAL)
    whole, killed = RunFiles(tmp_path / "whole"), RunFiles(tmp_path / "killed")
    train_tokenizer(settings, whole, "print-a", ignore)
    checkpoint_every(monkeypatch, 6)
    for last in (7, 14):  # before and after the adversarial term sets in at step 8
        with pytest.raises(Killed):
            train_tokenizer(settings, killed, "print-a", kill_at(last * 8))
    train_tokenizer(settings, killed, "print-a", ignore)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    adversarial = [("train_discriminator" in point["metrics"]) for point in points(killed)]
    assert adversarial == [False, True, True, True]


def test_killed_after_the_last_step(straight: RunFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(tmp_path)
    checkpoint_every(monkeypatch, 1)
    with pytest.raises(Killed):
        train_tokenizer(experiment(), files, "print-a", kill_at(160))
    train_tokenizer(experiment(), files, "print-a", kill_at(8))
    ours, theirs = weights(files), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_result(straight: RunFiles) -> None:
    """Figures are of the averaged weights that were saved, on the whole validation set."""
    result = straight.read_result() or {}
    assert (result["fingerprint"], result["status"]) == ("print-a", "finished")
    tokenizer = load_tokenizer(straight.tokenizer_checkpoint, "print-a")
    source = validation_source(experiment().data)
    assert len(source) == 40
    images_B3HW = to_model_range(source.load_batch(list(range(40)), [0] * 40)[0])
    with torch.no_grad():
        error = (tokenizer.decode(tokenizer.encode(images_B3HW)) - images_B3HW).square().mean()
    assert result["metrics"]["mean_squared_error"] == pytest.approx(float(error), rel=1e-4)
    assert straight.picture("reconstructions").read_bytes().startswith(b"\x89PNG")
    assert (read_json(straight.identity) or {})["role"] == "tokenizer"


def test_finished_is_finished(straight: RunFiles) -> None:
    train_tokenizer(experiment(), straight, "print-a", kill_at(8))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """A run that was killed after its sixth step, with a checkpoint of the fifth."""
    files = RunFiles(tmp_path_factory.mktemp("interrupted"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        report_every_step(monkeypatch)
        checkpoint_every(monkeypatch, 1)
        with pytest.raises(Killed):
            train_tokenizer(experiment(), files, "print-a", kill_at(6 * 8))
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
    files = RunFiles(Path(shutil.copytree(interrupted.folder, tmp_path / "copy")))
    files.last_checkpoint.write_bytes(spoil(files.last_checkpoint.read_bytes()))
    train_tokenizer(experiment(), files, "print-a", ignore)
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("varscale")]
    assert warning.startswith(f"{files.last_checkpoint}: not a readable checkpoint (")
    assert warning.endswith("; its run begins anew")
    ours, theirs = weights(files), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [point["images"] for point in points(files)] == [40, 80, 120, 160]


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(
    interrupted: RunFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = RunFiles(Path(shutil.copytree(interrupted.folder, tmp_path / "copy")))
    train_tokenizer(experiment(), files, "print-b", ignore)
    assert f"{files.last_checkpoint}: of the run print-a, expected print-b; its run begins anew" in caplog.messages
    assert files.finished("print-b")


def test_a_damaged_tokenizer_is_named_and_made_anew(
    straight: RunFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = RunFiles(Path(shutil.copytree(straight.folder, tmp_path / "copy")))
    assert tokenizer_ready(files, "print-a")
    content = files.tokenizer_checkpoint.read_bytes()
    files.tokenizer_checkpoint.write_bytes(flipped(content, len(content) // 2))
    assert not tokenizer_ready(files, "print-a")
    caplog.clear()
    train_tokenizer(experiment(), files, "print-a", ignore)
    assert f"the tokenizer is made anew: {files.tokenizer_checkpoint}: damaged" in caplog.text
    assert files.tokenizer_checkpoint.read_bytes() == content


def test_divergence(tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train_tokenizer(experiment(lr=1e30, grad_clip=1e30), RunFiles(tmp_path), "print-a", ignore)


def test_a_finished_tokenizer_can_be_taken(straight: RunFiles, tmp_path: Path) -> None:
    settings = little_experiment(tokenizer={"checkpoint": str(straight.tokenizer_checkpoint)})
    files = RunFiles(tmp_path / "run")
    train_tokenizer(settings, files, "print-c", kill_at(8))
    ours, theirs = load_tokenizer(files.tokenizer_checkpoint, "print-c").state_dict(), weights(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_tokenizer_whose_file_is_gone_is_made_anew(straight: RunFiles, tmp_path: Path) -> None:
    """As the message about a damaged one asks for."""
    files = RunFiles(Path(shutil.copytree(straight.folder, tmp_path / "copy")))
    files.tokenizer_checkpoint.unlink()
    train_tokenizer(experiment(), files, "print-a", ignore)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(weights(files).values(), weights(straight).values(), strict=True)
    )


def test_a_tokenizer_that_does_not_fit_is_named(straight: RunFiles, tmp_path: Path) -> None:
    brought = {"checkpoint": str(straight.tokenizer_checkpoint)}
    for changes, message in (
        ({"vocab_size": 32}, r"tokenizer\.safetensors: vocab_size is 16, but tokenizer\.vocab_size says 32"),
        ({"patch_nums": (1, 4)}, r"patch_nums is \(1, 2, 4\), but tokenizer\.patch_nums says \(1, 4\)"),
        ({"patch_nums": (1, 8), "channel_multipliers": (1,)}, "patch_nums is"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(little_experiment(tokenizer=brought | changes), RunFiles(tmp_path), "print-c", ignore)


def test_the_references_tokenizer_can_be_taken(straight: RunFiles, tmp_path: Path) -> None:
    """Exported and brought back, by whatever name; a torn file is named."""
    full_size = MultiScaleTokenizer(architecture((1, 2), 16, 4, 32))  # the reference's settings but for the sizes
    save_tokenizer(tmp_path / "ours", full_size, "print-a")
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
    encode_tokens(
        experiment(), straight, "print-a", TokenFiles(tmp_path), 300, lambda done, total: told.append((done, total))
    )
    assert told[-1] == (340, 340)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    tokenizer = load_tokenizer(straight.tokenizer_checkpoint)
    for split, source in (("train", training_source_of(experiment().data, 300)),
                          ("validation", validation_source(experiment().data))):  # fmt: skip
        store = TokenStore.open(tmp_path / split, "print-a")
        assert len(store) == len(source)
        pixels, labels = source.load_batch(list(range(30)), [0] * 30)
        tokens_BL, labels_B = store.tokens(torch.arange(30))
        expected_BL = torch.cat(tokenizer.encode(to_model_range(pixels)), dim=1)
        assert (tokens_BL == expected_BL).float().mean() > 0.99  # other batch sizes can round otherwise
        assert labels_B.tolist() == labels.tolist()
    summary = read_json(tmp_path / "summary.json") or {}
    assert summary["images"] == 300
    assert summary["unigram_entropy"] == pytest.approx(unigram_entropy(TokenStore.open(tmp_path / "train")).mean)


def training_source_of(data: Any, images: int) -> Any:
    """As many images as asked for, not whole windows."""
    whole = training_source(data, images)
    whole.num_images = images
    return whole
