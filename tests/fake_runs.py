"""Files as studies and their finished and half-done runs leave them."""

import json
from collections.abc import Iterable
from typing import Any, Literal

from varscale.store.layout import Kind, RunFiles, RunKey, Store, StudyFiles
from varscale.store.records import Result, RunIdentity, StudyCell, StudyRecord
from varscale.tracking import Forwarder

START = 1_790_000_000.0
BUDGETS = (1e12, 2e12)
"""Of the cells of `small_study`."""
ROLES: dict[Kind, Literal["tokenizer", "trunk", "cell"]] = {
    "tokenizers": "tokenizer",
    "trunks": "trunk",
    "cells": "cell",
}


def begun_run(store: Store, kind: Kind, name: str, fingerprint: str, title: str, **params: Any) -> RunFiles:
    run = store.run(RunKey(kind, name, fingerprint))
    RunIdentity(name=title, role=ROLES[kind], params=params).write(run.identity)
    return run


def append_points(run: RunFiles, first: int, count: int, start: float = START) -> None:
    with run.metrics.open("a") as file:
        for index in range(first, first + count):
            metrics = {"train_loss": 6.2 - 0.01 * index, "lr": 1e-3 / (1 + index)}
            file.write(json.dumps({"time": start + index, "images": 32 * (index + 1), "metrics": metrics}) + "\n")


def write_result(
    run: RunFiles,
    time: float,
    *,
    status: Literal["finished", "diverged"] = "finished",
    row: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    **metrics: float,
) -> None:
    (run.folder / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n" + run.fingerprint.encode())
    Result(
        fingerprint=run.fingerprint,
        status=status,
        time=time,
        metrics=metrics,
        row=row if row is not None else dict(metrics),
        provenance=provenance if provenance is not None else {"threads": 1, "device": "cpu", "compiled": False},
        pictures=("samples.png",),
    ).write(run.result)


def finished_cell(store: Store, depth: int, budget: float, *, points: int = 20, seed: int = 0) -> RunFiles:
    """A cell with a curve, a result and a picture; numbers made up from depth and budget."""
    title = f"d{depth} · {budget:.0e} FLOPs · seed {seed}".replace("e+", "e")
    params = {"depth": depth, "width": 2 * depth, "heads": 1, "seed": seed, "lr": 3e-3 / 7, "batch_size": 32}
    name = f"d{depth}-c{budget:.0e}-s{seed}".replace("+", "")
    run = begun_run(store, "cells", name, f"{depth:04d}{budget:.0e}{seed}".replace("+", ""), title, **params)
    append_points(run, 0, points)
    loss = 3 + 30 * (budget / 1e9) ** -0.4 + 0.02 * abs(depth - 12)
    numbers = {"loss": loss, "error": loss / 5, "loss_scale_1": loss + 0.5, "loss_scale_2": loss - 0.5}
    counts = {"params_total": 12 * depth * (2 * depth) ** 2 + 512, "images_seen": 32 * points}
    row = {"run": run.folder.name, **params, **numbers, **counts, "train_flops": budget * 0.999, "precision": "float32"}
    speeds = {"images_per_second": 250.0, "model_flops_utilisation": 0.4}
    write_result(run, START + points + 0.5, row=row, train_flops=budget * 0.999, **numbers, **counts, **speeds)
    return run


def unfinished_trunk(store: Store, depth: int, *, points: int = 30) -> RunFiles:
    run = begun_run(store, "trunks", f"d{depth}-s0", f"trunk{depth}", f"d{depth} · trunk", depth=depth, seed=0)
    append_points(run, 0, points)
    return run


def finished_tokenizer(store: Store) -> RunFiles:
    run = begun_run(store, "tokenizers", "rings", "tokens01", "tokenizer", vocab_size=64)
    write_result(run, START - 5, reconstruction_loss=0.25)
    return run


def study_cell(run: RunFiles, trunk: str = "", recipe: str = "one", title: str = "", **labels: Any) -> StudyCell:
    """A cell as a study sees it; its title and labels are made up from its folder's name unless they are given."""
    depth, budget, seed = run.folder.name.split("-")[:3]
    title = title or f"{depth} · {budget[1:]} FLOPs · seed {seed[1:]}"
    labels = {"variant": "", "budget_flops": float(budget[1:]), **labels}
    trunk = trunk or f"{depth}-s0-trunk{depth[1:]}"
    return StudyCell(folder=run.folder.name, trunk=trunk, title=title, labels=labels, recipe=recipe)


def write_study(store: Store, name: str, cells: Iterable[RunFiles | StudyCell], **changes: Any) -> StudyFiles:
    """A study of these cells."""
    seen = [cell if isinstance(cell, StudyCell) else study_cell(cell, experiment=name) for cell in cells]
    fields: dict[str, Any] = {
        "study": name,
        "created": START,
        "settings": {"grid": {"depths": [12, 16]}},
        "tokenizer": "rings-tokens01",
        "tokens": "rings-0123",
        "recipe": "one",
        "cells": tuple(seen),
    }
    StudyRecord(**{**fields, **changes}).write(store.study(name).record)
    return store.study(name)


def small_study(store: Store) -> tuple[Forwarder, RunFiles, list[RunFiles]]:
    """A study of a tokenizer, a trunk under way and two finished cells."""
    finished_tokenizer(store)
    trunk = unfinished_trunk(store, 12)
    cells = [finished_cell(store, 12, budget) for budget in BUDGETS]
    write_study(store, "rings", cells)
    return Forwarder(store.tracking_uri, store, "rings"), trunk, cells


def end_study(store: Store, name: str, cells: list[RunFiles], status: str = "FINISHED") -> None:
    """The study's record, once its sweep has ended."""
    write_study(store, name, cells, status=status, ended=START + 99)
