"""A Slurm cluster and SkyPilot's API server of a test's own, and a person's command line to them.

    with up(folder, sky) as cluster:
        cluster.run("launch", "shakespeare", ..., "--store", str(cluster.store))

tests/cluster/slurm.sh builds the node, home.py the home of SkyPilot. Ports are free ones; whatever
fails, nothing is left running or mounted when the block ends.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[1]
SLURM, HOME = CHECKOUT / "tests/cluster/slurm.sh", CHECKOUT / "tests/cluster/home.py"
DRIVER = CHECKOUT / "tuppence/assets/sky_driver.py"
USD_PER_HOUR = 36.0  # a GPU's: a cent a second
PATIENCE = 900.0  # seconds, of a machine that is busy with other things
# SkyPilot asks four cores and 16 GB for each GPU: so much is claimed that four jobs run at once.
NODE = {"NODE_CPUS": "64", "NODE_MEMORY_MB": "256000"}


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error; anything but one is a fault of ours."""
        lines = [line for line in self.err.splitlines() if line.startswith("tuppence: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Command:
    """A command of a person that runs; its words stand in files as they come."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def said(self) -> Said:
        """When it has ended."""
        code = self.process.wait(PATIENCE)
        return Said(code, self.out.read_text(), self.err.read_text())


@dataclass(frozen=True)
class Cluster:
    """`folder` of the cluster, `desk` where the person sits, `env` of all that talk to it."""

    folder: Path
    desk: Path
    sky: Path
    env: dict[str, str]
    started: list[Command] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def store(self) -> Path:
        """On the disk that the node shares with this machine."""
        return self.folder / "shared" / "store"

    def start(self, *words: str) -> Command:
        """tuppence WORDS, in a session of its own; Ctrl-C reaches it, whoever started pytest."""
        number = next(self.numbers)
        out, err = (self.desk / f"{number:03d}-{words[0]}.{end}" for end in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                ["env", "--default-signal=INT", sys.executable, "-m", "tuppence", *words],
                cwd=self.desk,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        found = Command(process, out, err)
        self.started.append(found)
        return found

    def run(self, *words: str) -> Said:
        return self.start(*words).said()

    def on_node(self, *command: str) -> str:
        words = [str(SLURM), "exec", str(self.folder), *command]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def queue(self, name: str) -> list[str]:
        """Allocations that SkyPilot holds for the launch of this name."""
        lines = self.on_node("squeue", "--noheader", "--format=%i %j").splitlines()
        return [line.split()[0] for line in lines if line.split()[1].startswith(name)]

    def costs(self, name: str) -> list[dict[str, Any]]:
        """SkyPilot's own meter: a row for each machine that the launch of this name ever had."""
        rows = until(self._metered, "SkyPilot tells costs", patience=120)["clusters"]
        return [row for row in rows if row["name"].startswith(name)]

    def _metered(self) -> Any:
        """None where its server is too busy to say."""
        done = subprocess.run(
            [str(self.sky), str(DRIVER), "costs"],
            input=json.dumps({"names": None}),
            env=self.env,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return json.loads(done.stdout)
        sys.stderr.write(f"costs: {done.stdout[-1000:]}\n")
        return None

    def stage_processes(self, mark: str) -> list[int]:
        """Processes on the node that belong to a stage whose mark begins so."""
        wanted = f"TUPPENCE_STAGE={mark}".encode()
        return [pid for pid, env in environments() if any(e.startswith(wanted) for e in env)]


def environments() -> Iterator[tuple[int, list[bytes]]]:
    """Of every process that can be seen, the variables it was started with."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            yield int(path.parent.name), path.read_bytes().split(b"\0")
        except OSError:  # gone
            continue


def until(true: Callable[[], Any], what: str, *, patience: float = PATIENCE) -> Any:
    """What `true` gives once it gives something."""
    end = time.monotonic() + patience
    while not (found := true()):
        assert time.monotonic() < end, f"after {patience:g} s still not: {what}"
        time.sleep(0.3)
    return found


# ---------------------------------------------------------------- up and down


@contextmanager
def up(folder: Path, desk: Path, sky: Path, *, keep: bool) -> Iterator[Cluster]:
    """Brought up in `folder`; `keep` leaves its files there, so that the next time takes seconds.

    Skips where this machine cannot have one.
    """
    _check_machine()
    assert os.environ.get("HOME") != str(folder / "home"), "leave the cluster's own home first"
    names = ("SSH_PORT", "SLURMCTLD_PORT", "SLURMD_PORT")
    ports = dict(zip(names, _free_ports(3), strict=True))
    env = os.environ | {name: str(port) for name, port in ports.items()} | NODE
    env["PYTHON"] = sys.executable
    home = [sys.executable, str(HOME)]
    more = [str(folder), "--sky", str(sky), "--port", str(_api_port())]
    cluster = None
    try:
        _clean(folder, env)
        _slurm("up", folder, env)
        more_start = [*more, "--ssh-port", str(ports["SSH_PORT"])]
        more_start += ["--usd-per-gpu-hour", f"{USD_PER_HOUR:g}"]
        done = _checked([*home, "start", *more_start], env)
        own = {"XDG_CACHE_HOME": str(desk / "cache"), "XDG_CONFIG_HOME": str(desk / "config")}
        cluster = Cluster(folder, desk, sky, _changed(os.environ | own, done))
        yield cluster
    finally:
        for command in cluster.started if cluster else ():
            command.process.kill()
            command.process.wait()
        subprocess.run([*home, "stop", *more], env=env, check=False, capture_output=True)
        _end_servers(folder)
        _slurm("down" if keep else "wipe", folder, env)
        assert f" {folder}/" not in Path("/proc/self/mounts").read_text()


def _changed(env: dict[str, str], lines: str) -> dict[str, str]:
    """With what `export` and `unset` of these lines say."""
    found = dict(env)
    for line in lines.splitlines():
        verb, what = shlex.split(line)
        name, _, value = what.partition("=")
        found.pop(name, None)
        if verb == "export":
            found[name] = value
    return found


def _check_machine() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the cluster is a chroot with mounts of its own")
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt: the cluster is built of the packages of Debian or Ubuntu")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount: no cluster can be made here")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _api_port() -> int:
    """A free port whose companion is free: SkyPilot's server takes a second one by the first."""
    for _ in range(50):
        (port,) = _free_ports(1)
        second = 50000 + (port - 46580 + 11) % 10000  # sky/server/requests/queues/mp_queue.py
        with suppress(OSError), socket.create_server(("127.0.0.1", second)):
            return port
    raise AssertionError("no free pair of ports for SkyPilot's server")


def _clean(folder: Path, env: dict[str, str]) -> None:
    """What an earlier time left, but for what was built."""
    _end_servers(folder)
    _slurm("down", folder, env)
    for part in ("home", "shared"):
        shutil.rmtree(folder / part, ignore_errors=True)


def _slurm(verb: str, folder: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        [str(SLURM), verb, str(folder)], env=env, check=False, stderr=subprocess.PIPE, text=True
    )
    if done.returncode == 2 and verb == "up":
        pytest.skip(f"no cluster can be made here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def _checked(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _end_servers(folder: Path) -> None:
    """SkyPilot's controllers outlive its server: whatever was started with that home ends, and what
    that started meanwhile."""
    mine = f"HOME={folder / 'home'}".encode()

    def gone() -> bool:
        theirs = [pid for pid, env in environments() if mine in env]
        for pid in theirs:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not theirs

    until(gone, "SkyPilot's processes gone", patience=120)
