import logging
from pathlib import Path

import pytest
from fake_runs import finished_cell, write_study

from varscale.errors import TrackingError
from varscale.store.layout import Store
from varscale.tracking import Forwarder, check_tracking_uri, dashboard_url, deliver_all, masked, runs_table
from varscale.tracking.uris import without_secrets


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "./mlruns", "sqlite://", "http://", "ftp://host"])
def test_uris_that_can_not_work(uri: str) -> None:
    with pytest.raises(TrackingError, match="use sqlite:///"):
        check_tracking_uri(uri)


@pytest.mark.parametrize("port", ["99999999", "65536", "0", "-1", "http"])
@pytest.mark.parametrize("start", ["http://localhost:", "http://me:secret@localhost:", "postgresql://me:secret@host:"])
def test_a_port_that_is_none_is_named_before_anything_runs(start: str, port: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="port is no number from 1 to 65535") as caught:
        Forwarder(f"{start}{port}/x", Store(tmp_path), "rings")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["http://localhost", "https://u:p@host:65535/base", "postgresql://u:p@host/db", "mysql+pymysql://h:1/db?ssl=1"],
)
def test_uris_that_can_work(uri: str) -> None:
    check_tracking_uri(uri)


@pytest.mark.timeout(60)
def test_a_folder_in_the_databases_place_is_named_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "mlflow.db").mkdir()
    for use in (
        lambda: deliver_all(store, store.tracking_uri),
        lambda: dashboard_url(store.tracking_uri),
        lambda: runs_table(store.tracking_uri, "rings"),
    ):
        with pytest.raises(TrackingError, match=r"mlflow.db is a folder; name a file"):
            use()


@pytest.mark.timeout(60)
def test_a_database_that_can_not_be_made_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines: list[str] = []
    state = deliver_all(Store(tmp_path / "runs"), f"sqlite:///{tmp_path}/file/mlflow.db", notify=lines.append)
    assert state.problem
    assert len(lines) == 1


SECRETS = {
    "http://me:hunter2@localhost:5000": "http://localhost:5000",
    "postgresql://me:hunter2@host:5432/db": "postgresql://host:5432/db",
    "postgresql+psycopg2://me:hunt@er2@host/db?sslmode=require": "postgresql+psycopg2://host/db",
    "postgresql://me:hunt/er2@host/db": "postgresql://host/db",
    "postgresql://me:hunt?er2@host/db": "postgresql://***",
    "mysql://host/db?user=me&password=hunter2": "mysql://host/db",
    "mysql://host/db?user=me@x&password=hunter2": "mysql://***",
    "me:hunter2@host": "host",
}


@pytest.mark.parametrize("uri", SECRETS)
def test_a_password_is_never_shown(uri: str) -> None:
    assert masked(uri) == SECRETS[uri]
    for text in (f"can't open {uri}", f"API request to {uri}/api/2.0 failed", f"{uri!r} \n and {uri}"):
        assert "er2" not in without_secrets(text, uri)


def test_paths_of_databases_stay_as_they_are() -> None:
    uri = "sqlite:////home/me@host/runs/mlflow.db"
    assert masked(uri) == uri
    assert without_secrets("file is not a database", uri) == "file is not a database"


@pytest.mark.parametrize("uri", ["http://me:hunter2@127.0.0.1:9", "postgresql+nodriver://me:hunter2@127.0.0.1:9/db"])
def test_a_password_reaches_no_notice_log_or_file(
    uri: str, store: Store, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    write_study(store, "rings", [finished_cell(store, 12, 1e12)])
    lines: list[str] = []
    forwarder = Forwarder(uri, store, "rings", lines.append)
    assert not forwarder.deliver()
    assert forwarder.stop(seconds=5) > 0
    assert len(lines) == 2
    with pytest.raises(TrackingError) as caught:
        runs_table(uri, "rings")
    shown = "".join([*lines, str(caught.value), repr(caught.value.__cause__), caplog.text, *capfd.readouterr()])
    files = (path.read_bytes() for path in store.runs.rglob("*") if path.is_file())
    assert "hunter2" not in shown
    assert not any(b"hunter2" in content for content in files)
