"""Runs on a GPU: equal to the bit however interrupted, in the memory that was foreseen, and sweeps by the command."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Killed, checkpoint_every, files_of, ignore, kill_at, report_every_step
from torchvision.models import vgg16
from toy_sweep import Finished, results, varscale, write_toy

from benchmarks.studies import Size, cell_of_steps, experiment_680, make_inputs, trunk_of
from benchmarks.trainings import bare_training, batches
from varscale.config import Experiment
from varscale.config.tokenizer import TokenizerArchitecture, TokenizerTraining
from varscale.config.yaml import changed
from varscale.data.loading import ImageBatches
from varscale.data.sources.rings.source import RingsSource
from varscale.families.storage import load_model
from varscale.numerics.device import deterministic
from varscale.numerics.machine import Share
from varscale.store.layout import RunFiles
from varscale.tokenizer.module import TokenizerModule
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Execution
from varscale.training.runs import train_cell, train_trunk
from varscale.training.trainer import Loader, make_trainer

pytestmark = pytest.mark.gpu
STEPS, BATCH = 20, 24


def paper_like(depth: int = 4, width_per_depth: int = 48, batch: int = BATCH, **changes: Any) -> Experiment:
    """680 tokens of 4,096 codes as in the paper, of little images; heads = depth."""
    experiment = experiment_680(Size(depth, depth * width_per_depth, depth), batch)
    return changed(experiment, {"model.drop_path_at_depth_24": 0.5, **changes}, "a test")


def weights(files: RunFiles) -> dict[str, torch.Tensor]:
    return load_model(files.weights).state_dict()


@pytest.mark.parametrize(
    ("precision", "compiled", "micro_batch"),
    [("float32", False, 0), ("bfloat16", False, 0), ("bfloat16", True, 0), ("bfloat16", False, 7)],
    ids=["float32", "bfloat16", "compiled", "in parts"],
)
def test_a_run_is_equal_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, compiled: bool, micro_batch: int
) -> None:
    """Straight; killed twice; and as a branch of a trunk."""
    experiment = paper_like(**{"runtime.micro_batch": micro_batch, "optim.precision": precision})
    inputs = make_inputs(tmp_path / "inputs", experiment, Execution(compiled, threads=4, peak_flops=1e12), images=512)
    cell = cell_of_steps(experiment, 4, STEPS)
    straight, killed, branch = (files_of(cell, inputs, tmp_path / name) for name in ("straight", "killed", "branch"))
    trunk = files_of(cell.trunk, inputs, tmp_path)
    report_every_step(monkeypatch)
    train_cell(cell, None, straight, inputs, ignore)
    train_trunk(cell.trunk, [cell.branch_images], trunk, inputs, ignore)
    train_cell(cell, trunk, branch, inputs, ignore)
    for every, last in ((4, 7), (3, 16)):
        checkpoint_every(monkeypatch, every)
        with pytest.raises(Killed):
            train_cell(cell, None, killed, inputs, kill_at(last * BATCH))
    train_cell(cell, None, killed, inputs, ignore)
    expected = weights(straight)
    for files in (killed, branch):
        found = weights(files)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_tokenizer_with_all_its_losses_is_equal_to_the_bit(tmp_path: Path) -> None:
    """The paper's settings with LPIPS and the adversarial term, a step in two parts; also the memory foreseen."""
    backbone = tmp_path / "vgg.pth"
    torch.save(vgg16().state_dict(), backbone)
    measured, states = 0, []
    for _ in range(2):
        module = TokenizerModule(
            TokenizerArchitecture(
                patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096, latent_channels=32, base_channels=160
            ),
            TokenizerTraining(
                images=400, batch_size=4, micro_batch=2, warmup_images=0, perceptual_weight=1.0,
                perceptual_weights_path=str(backbone), adversarial_weight=0.5, adversarial_start=0.0,
                quantize_after=0.0, restart_every_steps=2,
            ),
        )  # fmt: skip
        batches = ImageBatches(RingsSource(64, 256), seed=0, batch_size=4, start_step=0, num_steps=4, workers=4)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with deterministic():
            make_trainer(RunFiles(tmp_path), 4, [], precision="float32").fit(module, Loader(batches))
        measured = torch.cuda.max_memory_allocated()
        states.append(module.state_dict())
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert 0.7 < TokenizerShape(module.tokenizer.architecture).step_bytes(2) / measured < 4 / 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("depth", "width"), [(4, 64), (12, 64)])
def test_memory_is_as_foreseen(tmp_path: Path, precision: Any, compiled: bool, depth: int, width: int) -> None:
    """State and activations to within a third, what decides how many images pass at once; compiled blocks need less."""
    torch.compiler.reset()
    experiment = paper_like(depth, width, batch=16, **{"optim.precision": precision})
    trunk = trunk_of(experiment, depth)
    inputs = make_inputs(tmp_path, experiment, Execution(compiled, threads=4), images=128)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    training, data = bare_training(trunk, inputs), batches(trunk, inputs)
    training.step(next(data))
    torch.cuda.reset_peak_memory_stats()
    training.step(next(data))
    measured = torch.cuda.max_memory_allocated() - before
    foreseen = trunk.step_bytes(16)
    assert 0.75 < foreseen / measured < (5 / 3 if compiled else 4 / 3), (
        f"{foreseen / 2**20:.0f} MiB foreseen, {measured / 2**20:.0f} measured"
    )


def test_the_papers_step_passes_in_parts_that_fit(tmp_path: Path) -> None:
    """Depth 16, width 1024, 768 images a step: the parts that were chosen leave the memory neither full nor idle."""
    torch.compiler.reset()
    experiment = paper_like(16, 64, batch=768, **{"optim.precision": "bfloat16"})
    trunk = trunk_of(experiment, 16)
    execution = Execution(threads=4, memory_bytes=Share(4).memory_bytes())
    assert trunk.images_at_once(execution.memory_bytes) < 768
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    inputs = make_inputs(tmp_path, experiment, execution, images=768)
    loss = bare_training(trunk, inputs).step(next(batches(trunk, inputs)))
    assert math.isfinite(loss)
    share = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory
    assert 0.4 < share < 0.9


def test_a_sweep_by_the_command(tmp_path: Path, finished: Finished) -> None:
    """Where it was measured whether compiling pays a second call trains nothing; as the toy says, two are equal."""
    path = write_toy(tmp_path, runtime={"compile": "auto", "workers": 0, "threads": 0})
    first, second = (varscale("sweep", path, cwd=tmp_path) for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    rows = results(tmp_path / "runs")
    assert len(rows) == 8
    assert all(math.isfinite(row["loss"]) for row in rows.values())
    assert second.returncode == 0
    assert results(tmp_path / "runs") == rows
    again = tmp_path / "again"
    again.mkdir()
    process = varscale("sweep", write_toy(again), cwd=again)
    assert process.returncode == 0, process.stdout + process.stderr
    ours, theirs = results(again / "runs"), results(finished.runs)
    assert {name: row["loss"] for name, row in ours.items()} == {name: row["loss"] for name, row in theirs.items()}
