import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from requirements import require_program

from varscale.kernels import building


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that answers 42, and a cache folder of its own."""
    require_program("c++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "kernel.cpp"
    path.write_text('extern "C" int answer() { return 42; }')
    return path


def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache/varscale/kernels"


def replace_by_foreign_code(library: Path, tmp_path: Path) -> None:
    """What someone who can write to the cache may do."""
    other = tmp_path / "other.cpp"
    other.write_text('extern "C" int answer() { return 666; }')
    library.unlink()  # not overwritten: this process has the old one mapped
    subprocess.run(["c++", "-shared", "-fPIC", str(other), "-o", str(library)], check=True)


def answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.answer())


def test_built_once_and_anew_when_a_header_changes(source: Path, tmp_path: Path) -> None:
    source.write_text('#include "kernel.h"\nextern "C" int answer() { return ANSWER; }')
    for built, expected in ((1, 41), (2, 42), (2, 42)):
        (tmp_path / "kernel.h").write_text(f"constexpr int ANSWER = {expected};")
        assert answer(building.load(source, {})) == expected
        assert len(list(kept(tmp_path).iterdir())) == built


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_is_not_run(source: Path, tmp_path: Path, what: str) -> None:
    assert answer(building.load(source, {})) == 42
    (library,) = kept(tmp_path).iterdir()
    replace_by_foreign_code(library, tmp_path)
    library.chmod(0o777 if what == "file" else 0o700)
    kept(tmp_path).chmod(0o777 if what == "folder" else 0o700)
    assert answer(building.load(source, {})) == 42


@pytest.mark.parametrize("owned", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: str
) -> None:
    assert answer(building.load(source, {})) == 42
    (library,) = kept(tmp_path).iterdir()
    replace_by_foreign_code(library, tmp_path)
    foreign = library if owned == "file" else kept(tmp_path)
    ours = building._is_ours_alone
    monkeypatch.setattr(building, "_is_ours_alone", lambda path: path != foreign and ours(path))
    assert answer(building.load(source, {})) == 42


def test_another_user_is_told_by_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o755)
    assert building._is_ours_alone(tmp_path)
    monkeypatch.setattr(building.os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert not building._is_ours_alone(tmp_path)


def test_kept_libraries_are_for_this_user_only(source: Path, tmp_path: Path) -> None:
    building.load(source, {})
    for path in (kept(tmp_path), *kept(tmp_path).iterdir()):
        assert path.stat().st_mode & 0o077 == 0


def test_a_user_without_a_home_directory(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert answer(building.load(source, {})) == 42


def test_a_cache_folder_that_cannot_be_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert answer(building.load(source, {})) == 42


def test_without_a_compiler_the_library_is_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("this is not C++")
    assert building.load(source, {}) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert building.load(source, {}) is None
    monkeypatch.undo()
    monkeypatch.setenv("VARSCALE_NATIVE", "0")
    assert building.load(source, {}) is None


def test_a_slow_compiler_is_given_up(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(building.subprocess, "run", hang)
    assert building.load(source, {}) is None


def test_what_is_freed_is_kept_for_what_comes_next(source: Path) -> None:
    """By the resident memory of a process of its own, before and after it loads a kernel."""
    program = f"""
import ctypes
from pathlib import Path
from varscale.kernels import building

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])

def kept(pieces: int = 25_000) -> float:
    before, piece = pages(), libc.malloc(4096 * pieces)
    ctypes.memset(piece, 1, 4096 * pieces)
    libc.free(piece)
    return (pages() - before) / pieces

print(kept())
building.load(Path({str(source)!r}), {{}})
print(kept())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    given_back, kept_now = map(float, told.stdout.split())
    assert given_back < 0.1
    assert kept_now > 0.9
