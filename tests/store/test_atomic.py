"""Files appear whole or not at all, with the mode that the umask gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varscale.store.atomic import write_atomically, write_json
from varscale.store.weights import save_tensors

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from varscale.store.atomic import write_atomically

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # past the limit a write then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_atomically(Path(sys.argv[1]), b"new" * 10_000)
except OSError as error:
    print("failed", error.errno, error.filename)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from varscale.store.atomic import write_atomically

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"new")
"""


@pytest.mark.parametrize("old", [b"old", None])
def test_no_space_leaves_the_old_file(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "result.json"
    if old is not None:
        path.write_bytes(old)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("failed")
    assert done.stdout.strip().endswith(str(path))
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([(path.name, old)] if old else [])


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_writing_makes_folders_replaces_and_honours_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    path, before = tmp_path / "a" / "b" / "result.json", os.umask(umask)
    try:
        save_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(2)}, {})
        write_json(path, {"loss": 1.5})
        write_json(path, {"loss": 0.1 + 0.2})
    finally:
        os.umask(before)
    assert path.read_text() == '{\n "loss": 0.30000000000000004\n}\n'
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    assert path.stat().st_mode & 0o777 == mode
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == mode


@given(content=st.binary(max_size=2000))
def test_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "atomic.bin"
    write_atomically(path, content)
    assert path.read_bytes() == content
