"""The MLflow store: its URI, a client, and its failures in one line.

In: MLFLOW_TRACKING_URI or, if it is not set, `sqlite:///runs/mlflow.db` of the working directory, which is created on
first use. Out: an MLflow client. A sqlite store has its artefacts in `mlartifacts/` next to its file. A server that
does not answer is found within seconds. MLflow is imported on first use (1.6 s).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from prefill_router.errors import InputError, UnavailableError

if TYPE_CHECKING:
    from mlflow import MlflowClient
else:  # MLflow's types cost its import; tests check annotations when functions are called
    MlflowClient = Any

NAME = "prefill-router"  # name of the experiment and of the registered model
PROBE_S = 5.0  # time for a server to accept a connection and to answer
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A server that disappears during a request costs about 7 s. MLflow's defaults, 7 and 2, cost 4 minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# MLflow's codes for a request that is wrong, as opposed to a store that fails.
REQUEST_ERRORS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
WAY_OUT = "start it, or set MLFLOW_TRACKING_URI to another store"


def sqlite_uri(file: Path) -> str:
    """The URI of a sqlite store. Escapes `?` and `%` if SQLAlchemy would read them as a query or as an escape."""
    return "sqlite:///" + re.sub(r"\?|%(?=[0-9A-Fa-f]{2})", lambda found: quote(found[0]), str(file.resolve()))


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for another store."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).resolve()


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI or, if it is not set, a sqlite URI in `runs/` of the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path("runs/mlflow.db"))


def registry_uri() -> str:
    """MLFLOW_REGISTRY_URI or, if it is not set, `tracking_uri`."""
    return os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri()


def shown(uri: str) -> str:
    """The URI without user name and password, for messages."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def connect() -> MlflowClient:
    """An MLflow client of `tracking_uri`. Imports MLflow, and creates the folder of a sqlite store.

    Raises InputError for a URI that MLflow does not support, UnavailableError if the store does not answer.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it logs every retry
    uri = tracking_uri()
    for each in dict.fromkeys((uri, registry_uri())):
        probe(each)
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.set_tracking_uri(uri)
        with failures():
            return mlflow.MlflowClient()
    except MlflowException as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: got {shown(uri)!r}, expected http://HOST:PORT, https://HOST or sqlite:///FILE "
            f"({_reason(error)})"
        ) from None
    except ModuleNotFoundError as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI: got {shown(uri)!r}, which needs the Python package {error.name}; install it"
        ) from None


def probe(uri: str) -> None:
    """Raises UnavailableError if the store does not answer within seconds. Creates the folder of a sqlite store."""
    if (file := sqlite_file(uri)) is not None:
        _probe_sqlite(file)
        return
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"MLFLOW_TRACKING_URI: got {shown(uri)!r}, not a URL ({error})") from None
    if parts.scheme in ("http", "https"):
        if not host:
            raise InputError(f"MLFLOW_TRACKING_URI: got {shown(uri)!r}, expected http://HOST:PORT or https://HOST")
        _probe_http(uri)
    elif host and (port := port or DATABASE_PORTS.get(parts.scheme.partition("+")[0])):
        # SQLAlchemy's retries in MLflow would take 100 s.
        try:
            socket.create_connection((host, port), PROBE_S).close()
        except OSError as error:
            raise _no_answer(uri, error) from None


@contextmanager
def failures(passing: Sequence[str] = REQUEST_ERRORS) -> Iterator[None]:
    """Turns exceptions of MLflow and of the operating system into UnavailableError. Use it only around calls of MLflow.

    MLflow's exceptions with an error code in `passing` pass unchanged.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        if error.error_code in passing:
            raise
        raise _no_answer(tracking_uri(), error) from error
    except (SQLAlchemyError, OSError) as error:  # the exceptions of requests are OSErrors
        raise _no_answer(tracking_uri(), error) from error


def experiment_id(client: MlflowClient) -> str:
    """The id of the experiment `prefill-router`, created on first use.

    Sets the artefact folder of a sqlite store, since MLflow's default is the working directory.
    """
    experiment = client.get_experiment_by_name(NAME)
    if experiment is not None:
        return str(experiment.experiment_id)
    file = sqlite_file(tracking_uri())
    location = (file.parent / "mlartifacts").as_uri() if file is not None else None
    return str(client.create_experiment(NAME, artifact_location=location))


def _probe_sqlite(file: Path) -> None:
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            print(f"creating the tracking database {file} (once, takes seconds)", file=sys.stderr, flush=True)
            return
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True, timeout=PROBE_S)) as database:
            database.execute("pragma schema_version").fetchone()
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnavailableError(
            f"tracking database {file}: cannot be opened ({reason}); set MLFLOW_TRACKING_URI to another store"
        ) from None


def _probe_http(uri: str) -> None:
    """A request to the server's health check; every status below 500 counts as an answer."""
    import requests

    try:
        status = requests.get(f"{uri.rstrip('/')}/health", timeout=PROBE_S).status_code
    except requests.exceptions.SSLError:
        return  # a server answers; MLflow has its own settings for certificates
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise InputError(f"MLFLOW_TRACKING_URI: got {shown(uri)!r}, not a URL ({error})") from None
    except requests.exceptions.RequestException as error:
        raise _no_answer(uri, error) from None
    if status >= 500:
        raise UnavailableError(f"tracking store {shown(uri)}: answers with status {status}; {WAY_OUT}")


def _no_answer(uri: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"tracking store {shown(uri)}: does not answer or fails ({_reason(error)}); {WAY_OUT}")


def _reason(error: Exception) -> str:
    """The operating system's reason at the end of a chain of wrapped errors, or the beginning of the message."""
    text = " ".join(str(error).split())
    reasons = re.findall(r"\[Errno -?\d+\] ([^'\")\]]+)", text)
    if reasons:
        return str(reasons[-1]).strip()
    if "timed out" in text or "timeout" in text.lower():
        return "no answer in time"
    return text[:300] or type(error).__name__
