"""Compiles a C++ source of this package for the machine at hand, once, and loads it."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
BUILD_SECONDS = 120
SWITCH = "VARSCALE_NATIVE"
"""Environment variable that switches compiled kernels off when it is 0, loaded ones too."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's malloc.h."""

logger = logging.getLogger(__name__)


def enabled() -> bool:
    """Whether compiled kernels may be used: asked at every call, since a process may run with and without them."""
    return os.environ.get(SWITCH) != "0"


def usable() -> bool:
    """Whether this machine can compile kernels, and may use them."""
    return _compiler() is not None


def load(source: Path, definitions: dict[str, int]) -> ctypes.CDLL | None:
    """The compiled library, or None (with the reason in the log) where it cannot be had.

    It is kept in `$XDG_CACHE_HOME/varscale/kernels` (default ~/.cache), named by a hash of the source and what lies
    beside it, the flags, the compiler and the processor, so that machines that share a home directory don't take each
    other's. Code that someone else may have put there is never run: where the folder or the file belongs to another
    user, others can write to it, or there is no home directory, the library is built for this process alone.
    """
    _keep_freed_memory()
    compiler = _compiler()
    if compiler is None:
        logger.info("no C++ compiler on Linux: PyTorch's own kernels are used instead of %s", source.name)
        return None
    flags = [*FLAGS, *(f"-D{name}={value:d}" for name, value in definitions.items())]
    try:
        sources = (source, *sorted(path for path in source.parent.iterdir() if path.suffix in (".cpp", ".h")))
        identity = "\n".join((*(path.read_text() for path in sources), *flags, _version(compiler), _processor()))
        name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        command = [compiler, *flags, "-shared", "-fPIC", str(source)]
        folder = _cache()
        if folder is None or ((folder / name).exists() and not _is_ours_alone(folder / name)):
            with tempfile.TemporaryDirectory(prefix="varscale-") as private:  # what was loaded needs its file no more
                return ctypes.CDLL(str(_compile(command, Path(private) / name)))
        return ctypes.CDLL(str(_compile(command, folder / name)))
    except subprocess.CalledProcessError as error:
        reason = str(error.stderr).strip() or str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    logger.warning("%s could not be compiled, PyTorch's own kernels are used: %s", source.name, reason)
    return None


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep up to 1 GiB that was freed for what is allocated next.

    It would give large pieces back to the system, and get them anew, filled with zeros, in every training step: a third
    of a narrow model's forward pass and more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _compiler() -> str | None:
    if not enabled() or platform.system() != "Linux":
        return None
    return next((path for name in ("g++", "c++") if (path := shutil.which(name))), None)


def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS).stdout


def _compile(command: list[str], library: Path) -> Path:
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
        built.chmod(0o700)
        built.replace(library)  # atomic: another process sees all of it or nothing
    return library


def _cache() -> Path | None:
    """The folder that keeps libraries; None where there is none that only this user can write to."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "varscale" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError) as error:  # a read-only home directory, or a user without one
        logger.info("compiled kernels are not kept: %s", error)
        return None
    if _is_ours_alone(folder):
        return folder
    logger.warning("%s belongs to another user or can be written to by others: kernels are built anew instead", folder)
    return None


def _is_ours_alone(path: Path) -> bool:
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
