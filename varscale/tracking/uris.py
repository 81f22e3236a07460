"""Tracking URIs: which of them can work, and how they are shown without user name and password."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from varscale.errors import TrackingError

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql")
_RIGHT = "use sqlite:///path/to/mlflow.db or http://host:port (MLflow's file store is no longer supported)"


def check_tracking_uri(tracking_uri: str) -> None:
    """Raise `TrackingError` where a URI can't work; neither MLflow is imported nor the store touched."""
    shown = f"MLflow tracking URI {masked(tracking_uri)!r}"
    scheme = tracking_uri.split(":", 1)[0].split("+", 1)[0] if "://" in tracking_uri else ""
    if scheme not in _SCHEMES:
        raise TrackingError(f"{shown}: {_RIGHT}")
    if scheme == "sqlite":
        file = sqlite_file(tracking_uri)
        if file is None:
            raise TrackingError(f"{shown}: names no file; {_RIGHT}")
        if file.is_dir():
            raise TrackingError(f"{shown}: {file} is a folder; name a file")
        return
    try:
        address = urlsplit(masked(tracking_uri))
        host, port = address.hostname, address.port
    except ValueError:
        host, port = "", 0
    if port == 0:
        raise TrackingError(f"{shown}: its port is no number from 1 to 65535; {_RIGHT}")
    if not host and is_server(tracking_uri):
        raise TrackingError(f"{shown}: names no host; {_RIGHT}")


def is_server(tracking_uri: str) -> bool:
    """Whether a URI names a tracking server, which is its own dashboard."""
    return tracking_uri.startswith(("http://", "https://"))


def sqlite_file(tracking_uri: str) -> Path | None:
    """The database file of a `sqlite:///` URI, or None."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", tracking_uri)
    return Path(match.group(1)) if match and match.group(1) != ":memory:" else None


def masked(tracking_uri: str) -> str:
    """A URI without user name, password and query: how it is shown, and how stores are told apart in files."""
    return _parts(tracking_uri)[1]


def without_secrets(text: str, tracking_uri: str) -> str:
    """What MLflow says about a URI, without the URI's user name and password."""
    credentials, shown = _parts(tracking_uri)
    text = re.sub(r"(\w[\w+.-]*://)[^\s'\"]*@", r"\1", text.replace(tracking_uri, shown))
    password = credentials.partition(":")[2]
    for secret in {credentials, password, unquote(password)}:
        text = text.replace(secret, "***") if len(secret) > 2 else text
    return text


def _parts(tracking_uri: str) -> tuple[str, str]:
    """User name and password as `name:password`, and the URI without them."""
    scheme, separator, rest = tracking_uri.partition("://")
    if not separator:
        scheme, rest = "", tracking_uri
    if scheme.startswith("sqlite"):
        return "", tracking_uri  # whose path may contain an @
    credentials, _, place = rest.rpartition("@")
    if "?" in credentials:  # part of a password, or a query with an @ in it
        place = "***"
    return credentials, f"{scheme}{separator}{place.partition('?')[0]}"
