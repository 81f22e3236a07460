"""First experiments for one's pictures: valid, within the hours, around an optimum; with a machine that is made up."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_machine import MODEL_SPEED, PEAK, TOKENIZER_SPEED, speeds, write_pictures

from sweeps.devices import this_machine
from sweeps.draft import Draft, Drafter
from sweeps.draft_text import experiment_text
from sweeps.grid import grid_cells
from varscale.config import Experiment
from varscale.config.text import read_yaml
from varscale.config.yaml import load_experiment
from varscale.data.sources.finding import FoundData, find_data
from varscale.data.sources.of_experiment import data_identity
from varscale.errors import DataError, ExperimentError
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
    assert (data.image_size, tokenizer.patch_nums) == (
        32,
        (1, 2, 3, 4, 6, 8),
    )  # the largest below 40 px; docs/tokenizers.md
    assert tokenizer.vocab_size * 39 <= trained * tokenizer.tokens_per_image
    cells = grid_cells(experiment)  # every one has min_steps steps
    assert len({cell.budget_flops for cell in cells}) == 6
    # the arithmetic by itself, the models' on all processors, leaves room for what is not arithmetic
    shape, trunks = TokenizerShape(tokenizer.architecture), {}
    for cell in cells:
        trunks.setdefault(cell.trunk.label, []).append(cell.train_flops)
    models = sum(0.8 * max(own) + 0.2 * sum(own) for own in trunks.values())
    workers = this_machine(experiment.runtime, speeds(experiment)).workers
    arithmetic = tokenizer.training.images * shape.training_flops() / TOKENIZER_SPEED + models / MODEL_SPEED / workers
    assert (0.5 if count == 400 else 0.3) * 360 < arithmetic < 330
    assert draft.choices.minutes * 60 < 360.5
    # the best size by 50 tokens a parameter has a smaller and a larger one beside it, unless pictures would be repeated
    sizes = {cell.trunk.model.parameters(): cell.trunk.flops_per_image for cell in cells}
    budget = math.prod(grid.budgets) ** (1 / len(grid.budgets))
    ratios = [budget / flops * tokenizer.tokens_per_image / number for number, flops in sorted(sizes.items())]
    if count == 400:
        assert draft.choices.minutes == pytest.approx(6, rel=0.05)
        assert ratios[0] > 50 > ratios[-1]


@pytest.mark.parametrize("classes", [1, 2])
def test_captions_are_told_where_there_are_no_classes(classes: int, tmp_path: Path) -> None:
    for number in range(classes):
        folder = write_pictures(tmp_path / "all" / f"class{number}" if classes > 1 else tmp_path / "all", 40)
        for picture in folder.glob("*.png"):
            picture.with_suffix(".txt").write_text(f"discs, number {picture.stem}")
    experiment, draft = drafted(find_data(tmp_path / "all"), 0.1, tmp_path)
    told = classes == 1
    assert (experiment.model.condition == "text") is told
    assert (experiment.data.captions is not None) is told
    assert ("# captions: {encoder: words}" in draft.text) is not told
    cells = grid_cells(experiment)  # the sizes that comments name are those that are trained
    parameters = sorted({cell.trunk.model.parameters() for cell in cells})
    assert ", ".join(f"{number:,}" for number in parameters) in draft.text


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
    experiment, draft = drafted(forty, 0.2, tmp_path)
    written = read_yaml(draft.text)
    assert written.keys() >= {"data", "tokenizer", "model", "optim", "grid"}
    for section in ("data", "optim", "grid"):
        shown = experiment.model_dump(mode="json")[section]
        assert {name: shown[name] for name in written[section]} == written[section]
    assert max(map(len, draft.text.splitlines())) < 160
    part = experiment_text(replace(draft.choices, training_images=20, encoding_minutes=1.0))
    assert "# of 32, spread evenly over them: to encode all would take about 96 seconds" in part


@pytest.mark.parametrize(
    ("count", "side", "hours", "why"),
    [
        (40, 40, 0.1, "three quarters of the pictures have 40 px or more"),
        (400, 90, 0.1, "64 px would take too long here"),
        (30, 12, 0.2, "no draft has less; a quarter of the pictures have 12 px or less, and are enlarged"),
        (600, 40, 0.05, "32 px would take too long here"),
        (400, 40, 3.0, "three quarters of the pictures have 40 px or more"),
    ],
)
def test_what_comments_say_is_so(count: int, side: int, hours: float, why: str, tmp_path: Path) -> None:
    experiment, draft = drafted(find_data(write_pictures(tmp_path / "all", count, side)), hours, tmp_path)
    said = {key.strip(): words for key, words in re.findall(r"^( *\w+):[^#\n]*# (.+)$", draft.text, re.MULTILINE)}
    data, tokenizer, optim = experiment.data, experiment.tokenizer, experiment.optim
    trained = data_identity(data).stored_images
    shape, cells = TokenizerShape(tokenizer.architecture), grid_cells(experiment)
    assert said["image_size"] == why
    # an image is loaded in a millisecond, and takes what its FLOPs take
    training = tokenizer.training.images * (shape.training_flops() / TOKENIZER_SPEED + 1e-3)
    passes, taken = re.fullmatch(r"([\d.,]+) passes, in about (.+)", said["images"]).groups()
    assert number(passes) == pytest.approx(tokenizer.training.images / trained, rel=0.01)
    assert seconds(taken) == pytest.approx(training, rel=0.06)
    views = re.fullmatch(r"crops of each picture; ([\d,]+) in all, encoded in about (.+)", said["views"])
    assert number(views[1]) == trained * data.views
    encoded = trained * data.views + data.validation_images
    assert seconds(views[2]) == pytest.approx(encoded * (shape.encode_flops() / TOKENIZER_SPEED + 1e-3), rel=0.06)
    fills = re.match(r"([\d,]+) training images of (\d+) tokens fill at most ([\d,]+) codes", said["vocab_size"])
    assert [number(each) for each in fills.groups()] == [
        trained, tokenizer.tokens_per_image, trained * tokenizer.tokens_per_image // 39
    ]  # fmt: skip
    middle = next(cell.trunk for cell in cells if cell.trunk.depth == draft.choices.ladder.middle)
    images = math.prod(experiment.grid.budgets) ** (1 / 6) / middle.flops_per_image
    seen = re.match(r"\d+ blocks see ([\d.,]+) tokens a parameter", said["width_per_depth"])
    assert number(seen[1]) == pytest.approx(images * tokenizer.tokens_per_image / middle.model.parameters(), rel=0.06)
    channels = experiment.model.width_per_depth * draft.choices.ladder.middle
    shipped = load_experiment("rings" if "rings.yaml" in said["lr"].partition("sweeps")[0] else "cifar10")
    scaled = "scaled" in said["lr"]
    assert ("not measured for" in said["lr"] or scaled) is (shipped.name == "rings" or channels != 64)
    assert optim.lr == pytest.approx(shipped.optim.lr * (64 / channels if scaled else 1))
    assert ("would leave" in said.get("batch_size", "")) is (optim.batch_size < experiment.model.width_per_depth)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def seconds(text: str) -> float:
    value, unit = text.split()
    return number(value) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]


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
