"""File layout, fingerprints and atomic writes."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varscale.store import layout as files
from varscale.store.layout import (
    ExperimentFiles,
    RunFiles,
    TokenFiles,
    fingerprint,
    read_json,
    write_atomically,
    write_json,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
settings = st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), values, max_size=6)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return [reordered(item) for item in value] if isinstance(value, list) else value


# -------------------------------------------------------------------------------------------------- fingerprints


@given(settings)
def test_key_order_does_not_matter(given_settings: dict[str, Any]) -> None:
    assert fingerprint(**given_settings) == fingerprint(**reordered(given_settings))


@given(settings, st.from_regex(r"[A-Z]{1,4}", fullmatch=True), values)
def test_any_further_setting_matters(given_settings: dict[str, Any], key: str, value: Any) -> None:
    assert fingerprint(**given_settings) != fingerprint(**given_settings, **{key: value})


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_last_bit_matters(value: float) -> None:
    assert fingerprint(lr=value) != fingerprint(lr=math.nextafter(value, math.inf))


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    code = "from varscale.store.layout import fingerprint; print(fingerprint(lr=3e-4, depths=(2, 3), name='ä'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == fingerprint(name="ä", depths=[2, 3], lr=0.0003)
    assert len(other) == 16


def test_code_that_changes_numbers_changes_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(lr=1.0)
    monkeypatch.setattr(files, "NUMERICS_VERSION", files.NUMERICS_VERSION + 1)
    assert fingerprint(lr=1.0) != before


# ------------------------------------------------------------------------------------------------- atomic writes

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from varscale.store.layout import write_atomically

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # past the limit a write then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_atomically(Path(sys.argv[1]), b"new" * 10_000)
except OSError as error:
    print("failed", error.errno)
"""

KILLED = """
import os, signal, sys
from pathlib import Path
from varscale.store.layout import write_atomically

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
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([(path.name, old)] if old else [])


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"


def test_writing_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "result.json"
    write_json(path, {"loss": 1.5})
    write_json(path, {"loss": 0.1 + 0.2})
    assert read_json(path) == {"loss": 0.1 + 0.2}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("content", [None, b"", b'{"loss": 1.', b"[1, 2]", b"\xff\xfe{}"])
def test_torn_or_absent_json_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    assert read_json(path) is None


@given(content=st.binary(max_size=2000))
def test_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "atomic.bin"
    write_atomically(path, content)
    assert path.read_bytes() == content


# -------------------------------------------------------------------------------------------------------- layout


def test_everything_lies_under_the_experiments_folder(tmp_path: Path) -> None:
    layout = ExperimentFiles(tmp_path, "rings")
    inside = [
        layout.numerics,
        layout.laws,
        layout.tokens("f" * 16, 0).summary,
        layout.sweep("f" * 16),
        layout.tokenizer("f" * 16).result,
        layout.trunk("d2-s0", "f" * 16).milestone(640),
        layout.cell("d2-c1.0e+12-s0", "f" * 16).picture("samples"),
    ]
    assert all(path.is_relative_to(tmp_path / "rings") for path in inside)
    assert len(set(inside)) == len(inside)
    assert not any(path.exists() for path in tmp_path.iterdir())


def test_a_run_is_finished_when_its_result_has_its_fingerprint(tmp_path: Path) -> None:
    run = RunFiles(tmp_path / "cell")
    assert not run.finished("a")
    write_json(run.result, {"fingerprint": "a", "loss": 1.0})
    assert run.finished("a")
    assert not run.finished("b")
    run.result.write_text(json.dumps({"fingerprint": "a"})[:-3])
    assert not run.finished("a")


def test_tokens_of_another_experiment_are_taken_where_they_suffice(tmp_path: Path) -> None:
    """Growing them would replace files that the other experiment's workers are reading."""
    mine, other = ExperimentFiles(tmp_path, "mine"), ExperimentFiles(tmp_path, "other")
    theirs = TokenFiles(other.root / "tokens" / "a")
    assert mine.tokens("a", 0).folder == mine.root / "tokens" / "a"
    write_json(theirs.summary, {"images": 100})
    assert mine.tokens("a", 100).folder == theirs.folder
    assert mine.tokens("a", 101).folder == mine.root / "tokens" / "a"
    (mine.root / "tokens" / "a").mkdir(parents=True)
    assert mine.tokens("a", 1).folder == mine.root / "tokens" / "a"  # begun, and gone on with


def test_a_finished_tokenizer_is_found_in_other_experiments(tmp_path: Path) -> None:
    mine, other = ExperimentFiles(tmp_path, "mine"), ExperimentFiles(tmp_path, "other")
    theirs = other.tokenizer("a")
    write_json(theirs.identity, {})
    assert mine.tokenizer("a").folder == mine.root / "tokenizers" / "a"
    theirs.tokenizer_checkpoint.write_bytes(b"")
    write_json(theirs.result, {"fingerprint": "a"})
    assert mine.tokenizer("a").folder == theirs.folder


def test_a_finished_cell_is_found_in_other_experiments(tmp_path: Path) -> None:
    mine, other = ExperimentFiles(tmp_path, "mine"), ExperimentFiles(tmp_path, "other")
    assert mine.finished_cell("a" * 16) is None
    write_json(other.cell("d2-other", "a" * 16).result, {"fingerprint": "a" * 16})
    found = mine.finished_cell("a" * 16)
    assert found is not None
    assert found.folder == other.cell("d2-other", "a" * 16).folder
    write_json(mine.cell("d2", "a" * 16).result, {"fingerprint": "a" * 16})
    found = mine.finished_cell("a" * 16)
    assert found is not None
    assert found.folder == mine.cell("d2", "a" * 16).folder
