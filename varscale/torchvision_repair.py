"""Lets a CUDA-built torchvision import beside a CPU-only torch.

Package registries serve one torchvision wheel a platform, on Linux the CUDA one. Beside a CPU build of torch its
compiled extension cannot load, the operators it would define are missing, and `import torchvision` (hence lightning,
torchmetrics and torch-fidelity) fails with "operator torchvision::nms does not exist". Nothing in varscale uses
these operators, so their schemas are declared; torchvision then imports and its Python parts work.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

# What torchvision/_meta_registrations.py expects to exist whether or not the extension loaded.
_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def install() -> None:
    """Repair torchvision when, and only if, it is imported and its extension cannot load. Imports nothing heavy."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Repairer) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Repairer())


class _Repairer(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec("torchvision")
            if spec is not None and spec.origin is not None:
                _declare_missing_operators(Path(spec.origin).parent)
        return None  # the ordinary finders import it


def _declare_missing_operators(package: Path) -> None:
    import torch

    extensions = list(package.glob("_C.*")) + list(package.glob("_C_*"))
    try:
        for extension in extensions:
            torch.ops.load_library(str(extension))
        if extensions:
            return
    except (OSError, ImportError):
        pass
    for name, schema in _SCHEMAS.items():
        torch.library.define(name, schema)
