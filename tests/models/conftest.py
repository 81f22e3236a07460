"""Kernels are on, whatever a run in the same process decided: `varscale.training.numerics` switches them for good."""

import pytest

from varscale.models.native.building import SWITCH


@pytest.fixture(autouse=True)
def _kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
