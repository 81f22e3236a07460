"""First experiments for one's pictures: valid, within the hours, around an optimum; with a machine that is made up."""

import math
import re
from pathlib import Path

import pytest
from made_up_machine import PEAK, speeds, write_pictures

from sweeps.costs import study_costs
from sweeps.devices import this_machine
from sweeps.draft import Draft, Drafter
from sweeps.grid import grid_cells
from varscale.config import Experiment
from varscale.config.yaml import load_experiment
from varscale.data.sources.finding import FoundData, find_data
from varscale.data.sources.of_experiment import data_identity
from varscale.errors import DataError, ExperimentError
from varscale.tokenizer.design import scale_sides
from varscale.tokenizer.shape import TokenizerShape


@pytest.fixture(autouse=True)
def _loaded_in_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.draft._load_seconds", lambda _: 1e-3)


def drafted(found: FoundData, hours: float, folder: Path, *, gpu: bool = False) -> tuple[Experiment, Draft]:
    """Of a study whose name YAML could take for a number."""
    draft = Drafter(found, "2024", hours, speeds, gpu=gpu).draft(PEAK)
    (folder / "2024.yaml").write_text(draft.text)
    return load_experiment(str(folder / "2024.yaml")), draft


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> FoundData:
    return find_data(write_pictures(tmp_path_factory.mktemp("drafts") / "forty", 40))


@pytest.mark.parametrize(("count", "held_out"), [(40, 8), (400, 50)])
def test_an_experiment_within_the_hours(count: int, held_out: int, tmp_path: Path) -> None:
    experiment, draft = drafted(find_data(write_pictures(tmp_path / "all", count)), 0.1, tmp_path)
    data, tokenizer, grid, trained = experiment.data, experiment.tokenizer, experiment.grid, count - held_out
    assert (data.num_classes, data.validation_images, data_identity(data).stored_images) == (1, held_out, trained)
    assert data.image_size <= 40
    assert tokenizer.patch_nums == scale_sides(tokenizer.latent_size)
    assert tokenizer.vocab_size * 39 <= trained * tokenizer.tokens_per_image
    cells = grid_cells(experiment)  # every one has min_steps steps
    assert len({cell.budget_flops for cell in cells}) == 6
    # the arithmetic by itself, on both processors, leaves room for what is not arithmetic
    costs = study_costs(experiment, cells, validation=held_out, encoded=trained * data.views + held_out)
    assert this_machine(experiment.runtime, speeds(experiment)).least_seconds(costs) < draft.choices.minutes * 60 < 370
    # the best size by 50 tokens a parameter has a smaller and a larger one beside it, unless pictures would be repeated
    sizes = {cell.trunk.model.parameters(): cell.trunk.flops_per_image for cell in cells}
    budget = math.prod(grid.budgets) ** (1 / len(grid.budgets))
    ratios = [budget / flops * tokenizer.tokens_per_image / number for number, flops in sorted(sizes.items())]
    if count == 400:
        assert draft.choices.minutes == pytest.approx(6, rel=0.05)
        assert ratios[0] > 50 > ratios[-1]


@pytest.mark.parametrize(("hours", "early"), [(0.1, False), (2.0, True)])
def test_time_that_would_only_repeat_pictures_goes_into_seeds(
    hours: float, early: bool, forty: FoundData, tmp_path: Path
) -> None:
    experiment, draft = drafted(forty, hours, tmp_path)
    middle = next(cell for cell in grid_cells(experiment) if cell.label.startswith(f"d{draft.choices.ladder.middle}-"))
    longest = max(experiment.grid.budgets) / middle.trunk.flops_per_image
    assert longest == pytest.approx(100 * 32, rel=0.01)
    assert (len(experiment.grid.seeds) == 8) is early
    assert len(experiment.grid.seeds) > 1
    assert ("would only repeat" in draft.summary()) is early


def test_large_images_pass_in_parts_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varscale.numerics.machine.machine_bytes", lambda: 16.0 * 2**30)
    found = find_data(write_pictures(tmp_path / "large", 25, side=130))
    experiment, _ = drafted(found, 6000, tmp_path, gpu=True)
    assert (experiment.data.image_size, experiment.optim.precision, experiment.runtime.compile) == (
        128, "bfloat16", "auto"
    )  # fmt: skip
    shape, training = TokenizerShape(experiment.tokenizer.architecture), experiment.tokenizer.training
    assert shape.step_bytes(training.micro_batch) <= 0.6 * 16 * 2**30 < shape.step_bytes(2 * training.micro_batch)


def test_every_value_of_the_text_is_its_own(forty: FoundData, tmp_path: Path) -> None:
    _, draft = drafted(forty, 0.2, tmp_path)
    assert "extends" not in draft.text
    assert "32 training images of" in draft.text  # why the codebook is no larger
    assert max(map(len, draft.text.splitlines())) < 160


def test_what_makes_no_study(forty: FoundData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExperimentError, match=r"--hours 0\.001: too short .* try --hours \S+ or more$") as caught:
        drafted(forty, 0.001, tmp_path)
    named = re.search(r"try --hours (\S+)", str(caught.value))
    assert named is not None
    assert float(named[1]) < 0.05
    drafted(forty, float(named[1]), tmp_path)
    monkeypatch.setattr("sweeps.draft._load_seconds", lambda _: 4.0)
    with pytest.raises(ExperimentError, match=r"or smaller copies of the pictures: to load one takes 4 s$"):
        drafted(forty, 1, tmp_path)
    three = find_data(write_pictures(tmp_path / "three", 3))
    with pytest.raises(DataError, match="3 pictures; a study needs 20"):
        Drafter(three, "mine", 1.0, speeds, gpu=False)
