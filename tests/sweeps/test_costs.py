"""What a study costs, against sums over every single step, closed forms, and what finished runs wrote down."""

import json
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from toy_sweep import Finished, results, toy_experiment

from sweeps.costs import (
    INCEPTION_FLOPS,
    StudyCosts,
    encoding_work,
    extractor_flops,
    fidelity_work,
    size_costs,
    stored_bytes,
    tokenizer_work,
    validation_work,
)
from sweeps.devices import BLOCK_CALL_SECONDS, named_device
from sweeps.grid import grid_cells
from varscale.config import Experiment
from varscale.config.yaml import validate
from varscale.data.tokens.manifest import Manifest
from varscale.evaluation.extractors import RingsClassifier
from varscale.evaluation.plan import RINGS_TRAINING
from varscale.tokenizer.shape import TokenizerShape
from varscale.training.cells import Cell

SEEDS = {"name": "noise", "depths": [2], "budgets": [3e7, 4e7], "seeds": [1]}
FASTER = {"name": "fast", "depths": [3], "budgets": [6e7, 2e7], "settings": {"optim.lr": 1e-2}}


def costs_of(experiment: Experiment, cells: tuple[Cell, ...]) -> StudyCosts:
    return StudyCosts(size_costs(cells), tokenizer_work(experiment), encoding_work(experiment, 100), ())


def test_stored_bytes_are_those_of_the_stores_rows() -> None:
    for family in ("var", "diffusion"):
        settings = {**toy_experiment().model_dump(mode="json"), "model": {"family": family}}
        experiment = validate(settings, "a test")
        tokenizer = experiment.tokenizer
        manifest = Manifest(
            schema=2, tokenizer_fingerprint="", data_fingerprint="", patch_nums=tokenizer.patch_nums, num_classes=2,
            vocab_size=tokenizer.vocab_size, num_images=5, views=1, shard_images=8, procedural=True,
            latent_channels=tokenizer.latent_channels if family == "diffusion" else None,
        )  # fmt: skip
        assert stored_bytes(experiment) == manifest.row_type.bytes == manifest.row_type.rows(5).nbytes / 5
        tokens, side = tokenizer.tokens_per_image, tokenizer.latent_size
        expected = 2 * (1 + tokens) if family == "var" else 4 + 2 * tokenizer.latent_channels * side**2
        assert stored_bytes(experiment) == expected
    images = {"kind": "folder", "train_path": "a", "validation_path": "b", "image_size": 8, "num_classes": 70_000}
    many = validate({**toy_experiment().model_dump(mode="json"), "data": images}, "a test")
    assert stored_bytes(many) == 4 * (1 + many.tokenizer.tokens_per_image)  # a label that two bytes don't hold


def flops(works: Any) -> float:
    return sum(work.flops for work in works)


def test_totals_are_those_of_every_step_that_is_taken_once() -> None:
    cells = grid_cells(toy_experiment(grid={"seeds": [0, 5], "variants": [SEEDS, FASTER]}))
    trunk_steps, branch_steps, separate = set(), set(), 0.0
    for cell in cells:
        batch, size = cell.trunk.batch_size, cell.trunk.flops_per_image
        for step in range(cell.steps):
            separate += batch * size
            if step * batch < cell.branch_images:
                trunk_steps.add((cell.trunk.label, step, batch * size))
            else:
                branch_steps.add((cell.label, step, batch * size))
    costs = costs_of(toy_experiment(), cells)
    assert flops(costs.trunks) == sum(step[-1] for step in trunk_steps)
    assert flops(costs.branches) == sum(step[-1] for step in branch_steps)
    assert flops(costs.separate) == separate
    assert flops(costs.all) == flops((*costs.tokenizer, *costs.encoding, *costs.trunks, *costs.branches))
    assert len(costs.sizes) == len({cell.trunk.label for cell in cells}) == 6


def test_what_trunk_and_branches_save() -> None:
    """(0.8 · max + 0.2 · Σ) / Σ of budgets of 10, 20 and 40 steps: 46 of 70."""
    step = 4 * grid_cells(toy_experiment(grid={"depths": [2]}))[0].trunk.flops_per_image
    budgets = [10.0 * step, 20.0 * step, 40.0 * step]
    costs = costs_of(toy_experiment(), grid_cells(toy_experiment(grid={"depths": [2], "budgets": budgets})))
    assert flops(costs.trunks) + flops(costs.branches) == 46 * step
    assert flops(costs.separate) == 70 * step
    (size,) = costs.sizes
    parameters = size.trunk.model.parameters()
    assert size.bytes == 3 * (12 + 4) * parameters  # three checkpoints with two moments, three cells' weights


def test_planned_flops_are_those_that_finished_runs_logged(finished: Finished) -> None:
    experiment = toy_experiment()
    costs = costs_of(experiment, grid_cells(experiment))
    rows = results(finished.runs).values()
    assert flops(costs.separate) == sum(row["train_flops"] for row in rows)
    trained, leaving = 0.0, {}
    for trunk in (finished.runs / "trunks").glob("var-*"):
        params = json.loads((trunk / "run.json").read_text())["params"]
        images = [int(path.stem.removeprefix("images-")) for path in trunk.glob("images-*.ckpt")]
        trained += max(images) * params["flops_per_image"]
        leaving[params["depth"]] = sorted(images)
    assert flops(costs.trunks) == trained
    branches = 0.0
    for depth, milestones in leaving.items():
        own = sorted((row for row in rows if row["depth"] == depth), key=lambda row: row["images_seen"])
        for row, left_at in zip(own, milestones, strict=True):
            branches += (row["images_seen"] - left_at) * row["flops_per_image"]
    assert flops(costs.branches) == branches
    (tokenizer,) = (finished.runs / "tokenizers").glob("*/result.json")
    assert flops(costs.tokenizer) == json.loads(tokenizer.read_text())["metrics"]["train_flops"]
    for cell in (finished.runs / "cells").glob("var-*"):
        weights = sum(tensor.nbytes for tensor in load_file(cell / "weights.safetensors").values())
        assert weights in {size.trunk.model.weights_bytes() for size in costs.sizes}


def test_evaluations_are_counted_for_each_cell() -> None:
    fidelity = {"samples": 100, "reference_images": 300, "guidance": [0.0, 2.0]}
    experiment = toy_experiment(evaluation={"samples_per_class": 3, "fidelity": fidelity})
    cells = grid_cells(experiment)
    shape, models = TokenizerShape(experiment.tokenizer.architecture), [cell.trunk.model for cell in cells]
    shown = 3 * 2  # images of each of two classes
    passed = sum(32 * m.forward_flops() + shown * (m.sampling_flops() + shape.decode_flops()) for m in models)
    assert flops(validation_work(cells, 32)) == passed
    assert flops(encoding_work(experiment, 7)) == 7 * shape.encode_flops()
    drawn = sum(
        100 * (model.sampling_flops(guidance=guided) + shape.decode_flops()) for model in models for guided in (0, 1)
    )
    seen = (2 * len(cells) + 2) * 100 + 300  # each cell's twice, real ones, their reconstructions, and the reference
    every = [(cell, guidance) for guidance in (0.0, 2.0) for cell in cells]
    extractor = extractor_flops(experiment)
    assert extractor is not None
    floors = 100 * (shape.encode_flops() + shape.decode_flops())
    assert flops(fidelity_work(experiment, every, floors=True)) == drawn + floors + seen * extractor
    assert flops(fidelity_work(experiment, (), floors=False)) == 0
    assert fidelity_work(toy_experiment(), every, floors=True) == []


def test_drawing_counts_the_calls_of_blocks() -> None:
    """A pass a scale or a token, of each batch: what drawing one token after the other takes beside its few FLOPs."""
    fidelity = {"samples": 100, "reference_images": 300, "guidance": [0.0, 2.0], "batch_size": 32}
    for family, patch_nums, passes in (("var", [1, 2, 4], 3), ("raster", [4], 16)):
        changes = {"model": {"family": family}, "tokenizer": {"patch_nums": patch_nums}}
        experiment = toy_experiment(evaluation={"samples_per_class": 3, "fidelity": fidelity}, **changes)
        (cell, *_) = grid_cells(experiment)
        drawn = fidelity_work(experiment, [(cell, 0.0), (cell, 2.0)], floors=True)
        assert sum(work.block_calls for work in drawn) == 2 * 4 * passes * cell.trunk.depth
        shown = validation_work([cell], 32)
        assert sum(work.block_calls for work in shown) == passes * cell.trunk.depth
        device = named_device("h100", 0.3, experiment.runtime)
        seconds = device.seconds(work._replace(flops=1, executed=0) for work in drawn)
        assert seconds == (pytest.approx(8 * passes * cell.trunk.depth * BLOCK_CALL_SECONDS), False)


def test_flops_of_extractors() -> None:
    for side in (8, 24):
        fidelity = {"samples": 100}
        tokenizer = {"patch_nums": [1, 2, side // 2]}
        experiment = toy_experiment(data={"image_size": side}, tokenizer=tokenizer, evaluation={"fidelity": fidelity})
        width, features = int(RINGS_TRAINING["width"]), int(RINGS_TRAINING["features"])
        with FlopCounterMode(display=False) as counter:
            RingsClassifier(width, features, 2)(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        assert extractor_flops(experiment) == counter.get_total_flops()
    inception = torchvision.models.inception_v3(init_weights=False, aux_logits=False).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        inception(torch.zeros(1, 3, 299, 299, device="meta"))
    assert counter.get_total_flops() == INCEPTION_FLOPS
    other = toy_experiment(evaluation={"fidelity": {"extractor": "vgg16"}})
    assert extractor_flops(other) is None
    assert extractor_flops(toy_experiment()) == 0


def test_work_says_which_products_a_gpu_would_use() -> None:
    experiment = toy_experiment(optim={"precision": "bfloat16"})
    cells = grid_cells(experiment)
    costs = costs_of(experiment, cells)
    assert {work.arithmetic for work in (*costs.trunks, *costs.branches)} == {"bfloat16"}
    assert {work.arithmetic for work in (*costs.tokenizer, *costs.encoding)} == {"tf32"}
    plain = grid_cells(toy_experiment())
    assert {work.arithmetic for work in costs_of(experiment, plain).trunks} == {"float32"}
    model = plain[0].trunk.model
    assert costs.trunks[0].executed / costs.trunks[0].flops == pytest.approx(
        model.executed_training_flops() / model.training_flops()
    )
    imported = experiment.tokenizer.model_copy(update={"checkpoint": "vae.pth"})
    assert tokenizer_work(experiment.model_copy(update={"tokenizer": imported})) == ()
