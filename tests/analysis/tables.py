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
