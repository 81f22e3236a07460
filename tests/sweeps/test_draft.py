"""First experiments for one's pictures: valid, within the hours, around an optimum; with a machine that is made up."""

import math
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


def drafted(found: FoundData, hours: float, folder: Path) -> tuple[Experiment, Draft]:
    draft = Drafter(found, "mine", hours, speeds, gpu=False).draft(PEAK)
    (folder / "mine.yaml").write_text(draft.text)
    return load_experiment(str(folder / "mine.yaml")), draft


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> FoundData:
    return find_data(write_pictures(tmp_path_factory.mktemp("drafts") / "forty", 40))


@pytest.mark.parametrize("hours", [0.1, 0.3])
def test_an_experiment_for_forty_pictures(hours: float, forty: FoundData, tmp_path: Path) -> None:
    experiment, draft = drafted(forty, hours, tmp_path)
    data, tokenizer, grid = experiment.data, experiment.tokenizer, experiment.grid
    assert (data.num_classes, data.validation_images, data_identity(data).stored_images) == (1, 8, 32)
    assert data.image_size <= 40
    assert tokenizer.patch_nums == scale_sides(tokenizer.latent_size)
    assert tokenizer.vocab_size * 39 <= 32 * tokenizer.tokens_per_image < 2 * tokenizer.vocab_size * 39
    cells = grid_cells(experiment)  # every one has min_steps steps
    assert len({cell.budget_flops for cell in cells}) == 6
    # the arithmetic by itself, on both processors, leaves room for what is not arithmetic
    costs = study_costs(experiment, cells, validation=8, encoded=32 * data.views + 8)
    seconds = this_machine(experiment.runtime, speeds(experiment)).least_seconds(costs)
    assert 0.5 * hours * 3600 < seconds < hours * 3600
    assert draft.choices.minutes == pytest.approx(60 * hours, rel=0.05)
    # the best size by 50 tokens a parameter has a smaller and a larger one beside it
    sizes = {cell.trunk.model.parameters(): cell.trunk.flops_per_image for cell in cells}
    budget = math.prod(grid.budgets) ** (1 / len(grid.budgets))
    ratios = [budget / flops * tokenizer.tokens_per_image / number for number, flops in sorted(sizes.items())]
    assert ratios[0] > 50 > ratios[-1]


def test_time_that_would_only_repeat_pictures_goes_into_seeds(forty: FoundData, tmp_path: Path) -> None:
    experiment, draft = drafted(forty, 2.0, tmp_path)
    assert 1 < len(experiment.grid.seeds) <= 8
    assert len(grid_cells(experiment)) == len(experiment.grid.seeds) * 6 * len(draft.choices.ladder.blocks)


def test_every_value_of_the_text_is_its_own(forty: FoundData, tmp_path: Path) -> None:
    _, draft = drafted(forty, 0.2, tmp_path)
    assert "extends" not in draft.text
    assert "32 training images of" in draft.text  # why the codebook is no larger
    assert max(map(len, draft.text.splitlines())) < 160


def test_what_makes_no_study(forty: FoundData, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"--hours 0\.01: too short"):
        Drafter(forty, "mine", 0.01, speeds, gpu=False).draft(PEAK)
    three = find_data(write_pictures(tmp_path / "three", 3))
    with pytest.raises(DataError, match="3 pictures; a study needs 20"):
        Drafter(three, "mine", 1.0, speeds, gpu=False)
