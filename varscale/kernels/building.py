"""Compiles a C++ source of this package for the machine at hand, once, and loads it."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
BUILD_SECONDS = 120
SWITCH = "VARSCALE_NATIVE"
"""Environment variable that switches compiled kernels off when it is 0, loaded ones too."""

logger = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether compiled kernels may be used: asked at every call, since a process may run with and without them."""
    return os.environ.get(SWITCH) != "0"


def load(source: Path, definitions: dict[str, int]) -> ctypes.CDLL | None:
    """The compiled library, or None (with the reason in the log) where it cannot be had.

    It is kept in `$XDG_CACHE_HOME/varscale/kernels` (default ~/.cache), named by a hash of the source and the headers
    beside it, the flags, the compiler and the processor, so that machines that share a home directory don't take each
    other's.

    Args:
        source: The C++ file.
        definitions: Preprocessor constants.
    """
    compiler = _compiler()
    if compiler is None:
        logger.info("no C++ compiler on Linux: PyTorch's own kernels are used instead of %s", source.name)
        return None
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in definitions.items())]
    try:
        sources = (source, *sorted(source.parent.glob("*.h")))
        identity = "\n".join((*(path.read_text() for path in sources), *flags, _version(compiler), _processor()))
        library = _cache() / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            _compile([compiler, *flags, "-shared", "-fPIC", str(source)], library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        reason = str(error.stderr).strip() or str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    logger.warning("%s could not be compiled, PyTorch's own kernels are used: %s", source.name, reason)
    return None


def _compiler() -> str | None:
    if not enabled() or platform.system() != "Linux":
        return None
    return next((path for name in ("g++", "c++") if (path := shutil.which(name))), None)


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS).stdout


def _compile(command: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
        built.replace(library)  # atomic: another process sees all of it or nothing


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varscale" / "kernels"


def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
