"""Files as finished and half-done runs leave them."""

import json
from pathlib import Path
from typing import Any

from varscale.store.layout import ExperimentFiles, RunFiles, write_json

START = 1_790_000_000.0


def write_identity(run: RunFiles, name: str, role: str, print_: str, **params: Any) -> None:
    write_json(run.identity, {"name": name, "role": role, "fingerprint": print_, "params": params})


def append_points(run: RunFiles, first: int, count: int, start: float = START) -> None:
    with run.metrics.open("a") as file:
        for index in range(first, first + count):
            metrics = {"train_loss": 6.2 - 0.01 * index, "lr": 1e-3 / (1 + index)}
            file.write(json.dumps({"time": start + index, "images": 32 * (index + 1), "metrics": metrics}) + "\n")


def write_result(run: RunFiles, print_: str, time: float, *, status: str = "finished", **metrics: float) -> None:
    (run.folder / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n" + print_.encode())
    content = {"fingerprint": print_, "status": status, "time": time, "metrics": metrics, "pictures": ["samples.png"]}
    write_json(run.result, content)


def finished_cell(files: ExperimentFiles, depth: int, budget: float, *, points: int = 20, seed: int = 0) -> Path:
    """A cell with a curve, a result and a picture; numbers made up from depth and budget."""
    print_ = f"{depth:04d}{budget:.0e}{seed}"
    run = files.cell(f"d{depth}-c{budget:.1e}-s{seed}", print_)
    name = f"d{depth} · {budget:.0e} FLOPs · seed {seed}".replace("e+", "e")
    params = {"depth": depth, "width": 2 * depth, "heads": 1, "seed": seed, "budget_flops": budget, "lr": 3e-3 / 7}
    write_identity(run, name, "cell", print_, batch_size=32, family="var", compiled=False, **params)
    append_points(run, 0, points)
    params_total = 12 * depth * (2 * depth) ** 2 + 512
    loss = 3 + 30 * (budget / 1e9) ** -0.4 + 0.02 * abs(depth - 12)
    result = {"loss": loss, "error": loss / 5, "loss_scale_1": loss + 0.5, "loss_scale_2": loss - 0.5}
    write_result(
        run,
        print_,
        START + points + 0.5,
        train_flops=budget * 0.999,
        params_total=params_total,
        images_seen=32 * points,
        images_per_second=250.0,
        model_flops_utilisation=0.4,
        **result,
    )
    return run.folder


def unfinished_trunk(files: ExperimentFiles, depth: int, *, points: int = 30) -> Path:
    run = files.trunk(f"d{depth}-s0", f"trunk{depth}")
    write_identity(run, f"d{depth} · trunk · seed 0", "trunk", f"trunk{depth}", depth=depth, seed=0)
    append_points(run, 0, points)
    return run.folder
