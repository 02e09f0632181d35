"""Buckets to keep runs on, as fixtures: on a server that speaks S3, in memory, in a folder."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuppence import store
from tuppence.bucket import mirror
from tuppence.folder import RunFolder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are tried again at once."""
    monkeypatch.setattr(mirror, "RETRY_SECONDS", (0.01, 0.02))


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The line files of every folder that a test made are closed after it."""
    made: list[RunFolder] = []
    begin = RunFolder.__init__

    def noted(self: RunFolder, path: Path, **kind: bool) -> None:
        begin(self, path, **kind)
        made.append(self)

    monkeypatch.setattr(RunFolder, "__init__", noted)
    yield
    for folder in made:
        folder.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    """A server that speaks S3, on loopback."""
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def s3(server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A run's place in a bucket of this test's own."""
    address, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{random.randrange(10**9)}"
    store.Store(f"s3://{name}")._fs.mkdir(name)
    return f"s3://{name}/runs/x"


@pytest.fixture
def memory() -> Iterator[str]:
    """A run's place in memory."""
    import fsspec

    yield "memory://bucket/runs/x"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["s3", "memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same on every kind of store."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket/runs/x"
    place: str = request.getfixturevalue(request.param)
    return place
