"""Tables drawn from known laws, for the tests of `analysis`."""

import numpy as np
import pandas as pd


def sweep_table(depths=(4, 6, 8, 12), budgets=5, *, seed=0, noise=0.001, base=2.5e9, seeds=1):
    """A sweep's runs table: depth × budget, `seeds` runs on the middle cell, loss from a chinchilla law."""
    rng = np.random.default_rng(seed)
    rows = []
    for depth in depths:
        width = 2 * depth
        params = 19.2 * depth * width**2 + 512 * width
        for place, budget in enumerate(base * 2.0 ** np.arange(budgets)):
            middle = depth == depths[len(depths) // 2] and place == budgets // 2
            for repeat in range(seeds if middle else 1):
                images = budget / (6 * params * 130)
                loss = (3.2 + 30 * params**-0.4 + 90 * (130 * images) ** -0.38) * np.exp(noise * rng.standard_normal())
                rows.append(
                    {
                        "run": f"d{depth}-b{place}-s{repeat}",
                        "depth": depth,
                        "seed": repeat,
                        "variant": "",
                        "budget_flops": budget,
                        "train_flops": budget * rng.uniform(0.997, 1.0),
                        "params_total": params,
                        "params_active": 0.9 * params,
                        "images_seen": images,
                        "tokens_seen": 130 * images,
                        "loss": loss,
                        "loss_last_scale": 1.02 * loss - 0.05,
                        "error": 0.93 * (loss / 10) ** 0.2,
                        "error_last_scale": 0.9 * (loss / 10) ** 0.2,
                        "status": "finished",
                    }
                )
    return pd.DataFrame(rows)


def chinchilla_table(*, sizes=7, budgets=7, noise=0.0003, seed=0):
    """An IsoFLOP grid with C = 6ND from Epoch's refit of Hoffmann's law, with every budget's best size inside."""
    rng = np.random.default_rng(seed)
    rows = []
    for budget in np.geomspace(1e19, 1e21, budgets):
        centre = 0.1 * (budget / 6) ** 0.5
        for params in centre * np.geomspace(0.15, 6.0, sizes):
            tokens = budget / (6 * params)
            loss = 1.8172 + 482.01 * params**-0.3478 + 2085.43 * tokens**-0.3658
            rows.append({"N": params, "C": budget, "D": tokens, "loss": loss * np.exp(noise * rng.standard_normal())})
    return pd.DataFrame(rows)


def curve_table(*, rows=12, decades=5.0, noise=0.0005, E=1.7, alpha=0.2, seed=0):
    """Loss against compute from a power law above an offset."""
    rng = np.random.default_rng(seed)
    flops = 1e17 * np.geomspace(1, 10**decades, rows)
    return pd.DataFrame(
        {"C": flops, "loss": (E + 2.0 * (flops / 1e17) ** -alpha) * np.exp(noise * rng.standard_normal(rows))}
    )


def evaluation_table(*, depths=(3, 4, 6, 8, 12), budgets=5, floor=4.0, ratio=2.0, noise=0.0, seed=0):
    """A sweep's table with FID: both loss and FID have one best size at each budget, FID's `ratio` times that of loss.

    At the best size FID is floor + 40·(C/C₀)^-0.3 and loss 3 + 0.9·(C/C₀)^-0.15. MIND is a hundredth of FID.
    """
    table = sweep_table(depths=depths, budgets=budgets, seed=seed)
    rng = np.random.default_rng(seed + 1)
    compute = table["budget_flops"] / table["budget_flops"].min()
    best = 3 * table["params_total"].min() * compute**0.5
    table["loss"] = 3 + 0.9 * compute**-0.15 * (1 + 0.06 * np.log(table["params_total"] / best) ** 2)
    excess = 40 * compute**-0.3 * (1 + 0.2 * np.log(table["params_total"] / (ratio * best)) ** 2)
    fid = floor + excess * np.exp(noise * rng.standard_normal(len(table)))
    settings = {"extractor": "inception", "reference": "train-3f2a", "samples": 5000, "guidance": 1.5}
    return table.assign(
        **{"fid": fid, "fid_low": 0.97 * fid, "fid_high": 1.03 * fid, "fid_floor": floor, "rfid": 1.3 * floor},
        **{"mind": fid / 100, "mind_low": fid / 103, "mind_high": fid / 97, "mind_floor": floor / 100},
        **{f"evaluation_{name}": value for name, value in settings.items()},
    )


def quality_curve(*, rows=14, floor=3.0, alpha=0.35, noise=0.0, seed=0):
    """FID and loss against compute alone: FID = floor + 60·(C/C₀)^-alpha, loss = 3 + 0.8·(C/C₀)^-0.1."""
    compute = np.geomspace(1, 1e4, rows)
    errors = np.exp(noise * np.random.default_rng(seed).standard_normal(rows))
    fid = (floor + 60 * compute**-alpha) * errors
    return pd.DataFrame({"C": 1e15 * compute, "loss": 3 + 0.8 * compute**-0.1, "fid": fid, "fid_floor": floor})
