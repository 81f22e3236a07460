"""Where things lie, and which runs folders are usable."""

from pathlib import Path

import pytest

from varscale.errors import ExperimentError
from varscale.store.layout import RunKey, Store, TokenFiles


def test_studies_share_runs_and_have_a_folder_of_their_own(tmp_path: Path) -> None:
    store, print_of = Store(tmp_path), "f" * 16
    shared = [store.run(RunKey(kind, "name", print_of)) for kind in ("tokenizers", "trunks", "cells", "evaluations")]
    tokens = store.tokens(RunKey("tokens", "name", print_of))
    assert isinstance(tokens, TokenFiles)
    assert [run.folder for run in (*shared, tokens)] == [
        tmp_path / kind / f"name-{print_of}" for kind in ("tokenizers", "trunks", "cells", "evaluations", "tokens")
    ]
    assert {run.fingerprint for run in shared} == {print_of}
    study = store.study("rings")
    own = [study.record, study.execution, study.laws, study.lock, study.fitted, study.delivery("cells", "name")]
    assert all(path.is_relative_to(tmp_path / "studies" / "rings") for path in own)
    assert len(set(own)) == len(own)
    assert not list(tmp_path.iterdir())  # naming makes nothing


def test_a_folder_of_an_earlier_version_is_recognised(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.old_studies() == []
    (tmp_path / "rings").mkdir()
    (tmp_path / "rings" / "numerics.json").write_text("{}")
    (tmp_path / "older" / "sweeps").mkdir(parents=True)
    (tmp_path / "older" / "sweeps" / "0.sweep.json").write_text("{}")
    (tmp_path / "mlartifacts" / "rings").mkdir(parents=True)
    assert store.old_studies() == ["older", "rings"]


def test_a_runs_folder_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ExperimentError, match=r"--runs-dir .*file: a file; name a folder"):
        Store(tmp_path / "file").check()
    Store(tmp_path / "new" / "runs").check()
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may be root, who may write everywhere
    with pytest.raises(ExperimentError, match="can't be written to"):
        Store(tmp_path / "new").check()
    Store(tmp_path / "new").check(writing=False)


def test_all_of_a_runs_folder_must_be_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tokenizer is trained, not when the first cell is to be written."""
    store = Store(tmp_path)
    (tmp_path / "tokens").touch()
    with pytest.raises(ExperimentError, match=r"--runs-dir .*tokens: a file; name a folder"):
        store.check(writing=False)
    (tmp_path / "tokens").unlink()
    (tmp_path / "cells").mkdir()
    store.check()
    monkeypatch.setattr("os.access", lambda path, _: Path(path).name != "cells")
    with pytest.raises(ExperimentError, match=r"--runs-dir .*cells can't be written to; name another one"):
        store.check()
    store.check(writing=False)
