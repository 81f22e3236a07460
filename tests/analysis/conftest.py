"""Makes tables.py importable from the tests beside it, and leaves long coverage runs to `make test-coverage`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker, so that --strict-markers knows it."""
    config.addinivalue_line("markers", "coverage: a thousand planted tables of each law; run by `make test-coverage`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects coverage tests unless they are asked for with -m."""
    if "coverage" in (config.option.markexpr or ""):
        return
    long = [item for item in items if item.get_closest_marker("coverage")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
