"""What a test needs beyond the package: it skips with a reason where that is missing, or fails when CI demands all."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest


def shared_path(relative: str) -> Path:
    """A file of the reference data (`VARSCALE_SHARED`, default ../shared beside the checkout)."""
    root = Path(os.environ.get("VARSCALE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    path = root / relative
    if not path.exists():
        _missing(f"reference data {relative} not found under {root} (set VARSCALE_SHARED)")
    return path


def require_program(name: str) -> str:
    """The path of an installed program, such as `chromium`."""
    daemons = ["/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]  # on few users' PATH
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(daemons))
    if path is None:
        _missing(f"the program {name} is not installed")
    return str(path)


def require_package(name: str) -> None:
    """That a package of an extra can be imported."""
    if importlib.util.find_spec(name) is None:
        _missing(f"the package {name} is not installed (pip install -e '.[dev]')")


def require_gpu() -> None:
    """That PyTorch sees a GPU."""
    import torch

    if not torch.cuda.is_available():
        _missing("PyTorch sees no GPU")


def _missing(reason: str) -> None:
    if os.environ.get("VARSCALE_REQUIRE_ALL") == "1":
        pytest.fail(f"VARSCALE_REQUIRE_ALL=1 but {reason}")
    pytest.skip(reason)
