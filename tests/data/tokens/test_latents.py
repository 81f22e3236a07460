"""A store that holds latents instead of tokens, written and read by the same code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import store_of_rings

from varscale.data.loading import EvaluationBatches, StepBatches
from varscale.data.sources.rings.source import RingsSource
from varscale.data.tokens.store import LatentBatch, TokenStore, channel_statistics
from varscale.data.transforms import to_model_range
from varscale.errors import TokenStoreError


def encode(images_B3HW: torch.Tensor) -> list[torch.Tensor]:
    """Two channels that differ in size, and a constant one, at 4 × 4 places."""
    grey_B1hw = torch.nn.functional.avg_pool2d(images_B3HW.mean(1, keepdim=True), 2)
    return [torch.cat((grey_B1hw, 3 * grey_B1hw + 5, torch.full_like(grey_B1hw, 0.1)), dim=1)]


def latents_of_rings(folder: Path, images: int = 50, **changes: Any) -> TokenStore:
    return store_of_rings(folder, images, **{"encode": encode, "latent_channels": 3, **changes})


def expected(images: int = 50) -> tuple[torch.Tensor, np.ndarray]:
    source = RingsSource(images, 8)
    pixels, labels = source.load_batch(range(images), [0] * images)
    return encode(to_model_range(pixels))[0], labels


def test_latents_are_the_encoders_rounded_to_half_precision(tmp_path: Path) -> None:
    store = latents_of_rings(tmp_path)
    latents_BChw, labels = expected()
    for indices in ([3, 49, 0], list(range(16, 32)), []):  # of several shards, one, and none
        batch = store.samples(indices)
        assert isinstance(batch, LatentBatch)
        assert torch.equal(batch.latents_BChw, latents_BChw[indices].half().float())
        assert batch.labels_B.tolist() == labels[indices].tolist()
    assert store.labels().tolist() == labels.tolist()


def test_an_interrupted_store_is_the_same_to_the_byte(tmp_path: Path) -> None:
    calls = 0

    def stops(images_B3HW: torch.Tensor) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return encode(images_B3HW)

    with pytest.raises(KeyboardInterrupt):
        latents_of_rings(tmp_path / "a", encode=stops)
    latents_of_rings(tmp_path / "a")
    latents_of_rings(tmp_path / "b")
    for file in (tmp_path / "b").glob("*.npy"):
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "a" / "view-000-shard-000001-images-16.npy").write_bytes(b"")
    with pytest.raises(TokenStoreError, match="bytes, expected"):
        TokenStore.open(tmp_path / "a")


def test_statistics_equal_numpys(tmp_path: Path) -> None:
    statistics = channel_statistics(latents_of_rings(tmp_path))
    latents = expected()[0].half().numpy().astype(np.float64)
    np.testing.assert_allclose(statistics.mean, latents.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(statistics.deviation[:2], latents.std((0, 2, 3))[:2], rtol=1e-6)
    assert statistics.deviation[2] == 1  # it can't be divided by 0


def test_batches_hold_latents(tmp_path: Path) -> None:
    store = latents_of_rings(tmp_path)
    step = StepBatches(store=store, seed=0, batch_size=6, start_step=0, num_steps=1).batch(0)
    assert {name: tuple(value.shape) for name, value in step.items()} == {
        "latents_BChw": (6, 3, 4, 4), "labels_B": (6,), "sample_index_B": (6,),
    }  # fmt: skip
    last = list(EvaluationBatches(store, batch_size=20))[-1]
    assert torch.equal(last["latents_BChw"], expected()[0][40:].half().float())


def test_what_is_no_latent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenStoreError, match=r"shapes \[\(8, 3, 4, 4\)\], expected \[\(8, 2, 4, 4\)\]"):
        latents_of_rings(tmp_path / "a", latent_channels=2)
    with pytest.raises(TokenStoreError, match="not all finite, or beyond ±65504"):
        latents_of_rings(tmp_path / "b", encode=lambda images: [1e6 * encode(images)[0]])
    store_of_rings(tmp_path / "c")
    with pytest.raises(TokenStoreError, match="latent_channels: None, expected 3; it is another token store"):
        latents_of_rings(tmp_path / "c")
