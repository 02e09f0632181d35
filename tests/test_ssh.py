"""A machine of one's own, by ssh: a real sshd on loopback, with keys and a home of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tuppence import checkpoint, config, host, recipes
from tuppence.cloud import record
from tuppence.cloud.ssh import launch_ssh, ssh_fetch, ssh_logs, ssh_status, ssh_stop
from tuppence.cloud.ssh_files import own_text
from tuppence.cloud.ssh_host import Host, Lost
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.pipeline import named
from tuppence.plan import hardware
from tuppence.plan.hardware import Calibration

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
WAIT_SECONDS = 240.0  # many times what a busy machine needs
TINY = [
    "model.family=gpt2",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.sequence_len=16",
    "train.batch_tokens=64",
    "train.precision=fp32",
    "train.eval_tokens=64",
    "train.sample_tokens=0",
    "train.eval_every=500",
    "data.tokenizer=char",
    "machine.usd_per_hour=3.6",
    "machine.threads=2",
]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the far side is Linux"),
    pytest.mark.skipif(SSHD is None, reason="no sshd here: install openssh-server"),
    pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh here: install openssh-client"),
]


@dataclasses.dataclass(frozen=True)
class Box:
    """The machine: `config` is ssh's -F with the alias box, `home` its user's home."""

    config: Path
    home: Path
    tools: Path
    server: subprocess.Popen[bytes]
    key: Path

    def args(self, *words: str, runs: Path, **others: Any) -> Namespace:
        known = {
            "words": ["shakespeare", *TINY, *words],
            "runs": str(runs),
            "ssh": "box",
            "ssh_config": str(self.config),
            "folder": None,
            "python": sys.executable,
            "store": None,
            "stages": None,
            "tasks": None,
            "dry_run": False,
            "detach": False,
        }
        return Namespace(**{**known, **others})

    def sessions(self) -> list[int]:
        """The sshd processes of connections."""
        return _below(self.server.pid)

    def without(self, *names: str) -> None:
        """Hide tools: they are not on the PATH of what logs in next."""
        for name in names:
            (self.tools / name).unlink(missing_ok=True)


@pytest.fixture
def box(tmp_path: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    """sshd with a home in `tmp_path`, whose calibration is known already."""
    home, tools, ssh = tmp_path / "home", tmp_path / "tools", tmp_path / "ssh"
    for folder in (home, ssh):
        folder.mkdir()
    _tools(tools)
    for name in ("key", "host"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / name)]
        subprocess.run(words, check=True)
    port = _free_port()
    (ssh / "config").write_text(_client(ssh, port))
    (ssh / "sshd").write_text(_server(ssh, port, home, tools))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
    with monkeypatch.context() as there:
        there.setenv("XDG_CACHE_HOME", str(home / "tuppence" / ".tuppence" / "cache"))
        hardware.save_calibration(dataclasses.replace(calibration, name=host.cpu_name()))
    assert SSHD is not None
    with (ssh / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(ssh / "sshd")], stderr=log)
    made = Box(ssh / "config", home, tools, server, ssh / "key")
    _until(lambda: Host("box", str(made.config)).test("true") or None, (Lost,))
    yield made
    for launched in home.glob("tuppence/*/job"):
        for pid in _members(launched.read_text().split()[0]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for pid in made.sessions():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.kill()
    server.wait()


def _tools(folder: Path) -> None:
    """All commands of this machine that a test may hide, and no python but the test's own."""
    folder.mkdir()
    for place in ("/usr/bin", "/bin"):
        for each in os.scandir(place):
            link = folder / each.name
            if not each.name.startswith(("python", "uv", "pip")) and not link.is_symlink():
                link.symlink_to(each.path)


def _client(ssh: Path, port: int) -> str:
    return (
        f"Host box\n HostName 127.0.0.1\n Port {port}\n IdentityFile {ssh}/key\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {ssh}/known\n"
        f" StrictHostKeyChecking accept-new\n LogLevel ERROR\n"
        f"Host gone\n HostName 127.0.0.1\n Port {_free_port()}\n"
        f"Host nowhere\n HostName nowhere.invalid\n"
        f"Host other\n HostName 127.0.0.1\n Port {port}\n IdentityFile {ssh}/host\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {ssh}/known\n"
        f" StrictHostKeyChecking accept-new\n"
        f"Host unknown\n HostName 127.0.0.1\n Port {port}\n UserKnownHostsFile /dev/null\n"
        f" StrictHostKeyChecking yes\n"
    )


def _server(ssh: Path, port: int, home: Path, tools: Path) -> str:
    return (
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {ssh}/host\nPidFile none\n"
        f"AuthorizedKeysFile {ssh}/key.pub\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nKbdInteractiveAuthentication no\nMaxStartups 100\n"
        f"SetEnv HOME={home} PATH={tools} TMUX_TMPDIR={home} BASH_ENV=/dev/null\n"
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _below(pid: int) -> list[int]:
    """Processes that descend from this one."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in told.stdout.splitlines()]
    found = [child for child, parent in pairs if parent == pid]
    return [*found, *(each for child in found for each in _below(child))]


def _members(job: str) -> list[int]:
    """Processes that carry the job's mark: read from the system, not asked of the code."""
    found = []
    for each in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if each.name.isdigit() and f"TUPPENCE_JOB={job}".encode() in (
                (each / "environ").read_bytes().split(b"\0")
            ):
                found.append(int(each.name))
    return found


def _until(look: Callable[[], Any], errors: tuple[type[Exception], ...] = ()) -> Any:
    """What `look` gives, once it gives something."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(*errors):
            if (found := look()) is not None:
                return found
        time.sleep(0.05)
    raise AssertionError("waited too long")


def _asked(args: Namespace) -> config.Run:
    words = list(args.words)
    spec = words.pop(0)
    return named(config.override(recipes.get(spec), words), spec)


def _launched(args: Namespace) -> tuple[dict[str, Any], list[str]]:
    """The document, and what was said."""
    said: list[str] = []
    done = launch_ssh(args, _asked(args), say=said.append, confirm=said.append)
    return done, said


def _trains(box: Box, name: str, beyond: int = 0) -> int:
    """Wait until steps were logged; the last one."""
    folder = RunFolder(box.home / "tuppence" / name / "runs" / name)

    def step() -> int | None:
        steps = [row["step"] for row in folder.rows("metrics")]
        return steps[-1] if steps and steps[-1] > beyond else None

    return int(_until(step, (Fault, OSError)))


# ---------------------------------------------------------------- from start to end


@pytest.mark.slow
def test_a_run_goes_on_through_lost_connections_and_comes_home(
    box: Box, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    box.without("tmux")
    text = tmp_path / "texts" / "own.txt"
    text.parent.mkdir()
    text.write_text("to be or not to be, that is the question\n" * 2000)
    runs = tmp_path / "runs"
    args = box.args("name=kept", "budget.steps=800", f"data.source={text}", runs=runs)

    def cut() -> None:
        _trains(box, "kept")
        for pid in box.sessions():  # the far side's processes of the connection
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        at = _trains(box, "kept", beyond=100)
        for pid in _below(os.getpid()):  # and this side's
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "ssh":
                    os.kill(pid, signal.SIGKILL)
        cuts.append(at)

    cuts: list[int] = []
    cutting = threading.Thread(target=cut)
    cutting.start()
    done, said = _launched(args)
    cutting.join()
    assert cuts != []
    assert done["state"] == "finished"
    assert done["how"] != "tmux"
    assert sum("is lost; kept goes on there" in line for line in said) >= 1
    there = box.home / "tuppence" / "kept"
    assert capfdbinary.readouterr().err == (there / "log.txt").read_bytes()  # nothing lost or twice
    here = RunFolder(runs / "kept")
    assert [row["step"] for row in here.rows("metrics")][-1] == 800
    assert sum(event["code"] in ("start", "resume") for event in here.rows("events")) == 1
    checkpoint.verify(checkpoint.choose(here, "best"))
    assert json.loads((there / "runs/kept/plan.json").read_text())["data"]["source"].startswith(
        str(there / "text-")
    )
    known = record.read(here.path)
    assert known is not None
    assert known.state == "finished"
    assert 0 < done["usd"] <= done["seconds"] / 3600 * 3.6 + 0.002

    again, said = _launched(args)
    assert again["state"] == "finished"
    assert "nothing to do" in said[-1]
    assert ssh_fetch(known, here.path)["files"] == 0  # all is here, and is not brought again
    weights = next(here.checkpoints.glob("step_*/model.safetensors"))
    weights.write_bytes(b"damaged")
    assert ssh_fetch(known, here.path)["files"] == 2  # and what lists it
    checkpoint.verify(weights.parent)
    assert not (weights.parent / "optimizer.safetensors").exists()
    ssh_fetch(known, here.path, checkpoint="last")
    newest = checkpoint.choose(here, "last")
    checkpoint.verify(newest)
    assert (newest / "optimizer.safetensors").exists()
    with pytest.raises(UserError, match="--checkpoint 7: there are those of steps"):
        ssh_fetch(known, here.path, checkpoint="7")
    other = box.args("name=kept", "budget.steps=9", f"data.source={text}", runs=runs)
    with pytest.raises(UserError, match="begun with other words"):
        _launched(other)
    tail = tmp_path / "tail"
    with tail.open("wb") as out:
        ssh_logs(known, follow=True, tail=2, out=out)
    assert tail.read_bytes() == b"".join(
        (there / "log.txt").read_bytes().splitlines(keepends=True)[-2:]
    )


@pytest.mark.slow
def test_stop_ends_every_process_and_the_same_command_goes_on(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "it's a secret")
    runs = tmp_path / "runs"
    args = box.args("name=long", "budget.steps=1000000", runs=runs, detach=True)
    done, said = _launched(args)
    assert done["state"] == "running"
    assert any(done["job"] in line or "setsid" in line for line in said)
    _trains(box, "long")
    known = record.read(runs / "long")
    assert known is not None
    members = _members(known.ssh["job"])
    assert len(members) >= 3  # the job, node.sh and the trainer
    assert any(
        b"HF_TOKEN=it's a secret" in Path(f"/proc/{p}/environ").read_bytes() for p in members
    )
    for place in (box.home, runs):
        for path in place.rglob("*"):
            assert not path.is_file() or b"it's a secret" not in path.read_bytes(), path
    with pytest.raises(UserError, match="long is running on box; see it with tuppence status"):
        _launched(args)

    told = ssh_stop(known)
    assert told["was"] == "running"
    assert _members(known.ssh["job"]) == []
    assert ssh_status(known)["state"] == "stopped"
    assert ssh_status(known)["exit_code"] == 143  # it saved: it was not killed
    assert (box.home / "tuppence/long/runs/long/checkpoints/last.json").exists()
    assert ssh_stop(known)["was"] == "stopped"

    at = _trains(box, "long")
    box.without("tmux")
    assert _launched(args)[0]["how"] != "tmux"
    _trains(box, "long", beyond=at)
    folder = RunFolder(box.home / "tuppence/long/runs/long")
    assert [e["code"] for e in folder.rows("events")].count("resume") == 1
    known = record.read(runs / "long")
    assert known is not None
    for pid in _members(known.ssh["job"]):  # as a power cut does
        os.kill(pid, signal.SIGKILL)
    assert ssh_status(known)["state"] == "lost"
    assert ssh_stop(known, clean=True)["cleaned"]
    assert not (box.home / "tuppence").exists()
    assert ssh_status(known)["state"] == "not started"
    assert ssh_stop(known, clean=True)["left"] == 0


@pytest.mark.slow
def test_what_the_trainer_refuses_is_said_in_its_words(box: Box, tmp_path: Path) -> None:
    args = box.args("name=bad", "budget.steps=5", "data.source=no/such.txt", runs=tmp_path / "runs")
    with pytest.raises(UserError, match=r"bad failed on box: .*no/such.txt"):
        _launched(args)


def test_half_a_launch_can_be_stopped(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise Lost("the network is gone")

    monkeypatch.setattr("tuppence.cloud.ssh.send_job", breaks)
    with pytest.raises(Lost):
        _launched(box.args("name=half", "budget.steps=5", runs=tmp_path / "runs"))
    known = record.read(tmp_path / "runs" / "half")
    assert known is not None
    assert ssh_status(known)["state"] == "not started"
    assert ssh_stop(known)["left"] == 0


def test_a_dry_run_sends_and_writes_nothing(box: Box, tmp_path: Path) -> None:
    args = box.args("name=dry", "budget.usd=0.5", runs=tmp_path / "runs", dry_run=True)
    done, said = _launched(args)
    assert "node.sh" not in done["job"]
    assert "prepare train --store" in done["job"]
    assert "--budget-usd 0.5" in done["job"]
    assert "$3.6/h" in said[0]
    assert not (tmp_path / "runs").exists()
    assert not (box.home / "tuppence" / "dry").exists()


# ---------------------------------------------------------------- refused, in one line


@pytest.mark.parametrize(
    ("given", "words", "message"),
    [
        ({"ssh": "nowhere"}, [], "no machine of that name"),
        ({"ssh": "gone"}, [], "gone cannot be reached: .*refused"),
        ({"ssh": "other"}, [], "refuses the key"),
        ({"ssh": "unknown"}, [], "its key is not known here"),
        ({"ssh": "-oProxyCommand=touch /tmp/x"}, [], "name a host as ssh takes it"),
        ({"ssh_config": "/no/such/config"}, [], "the ssh config file cannot be read"),
        ({"python": "/usr/bin/env"}, [], "/usr/bin/env: not a Python of 3.11"),
        ({"python": None}, [], "no Python >= 3.11 with pip, no uv and no curl"),
        ({}, ["machine.gpu=H100"], "machine.gpu=H100: box has no GPU"),
        ({}, ["machine.gpu_count=8"], "machine.gpu_count=8: box has 0 "),
        ({}, ["machine.nodes=2"], "machine.nodes=2: --ssh starts one machine"),
        ({}, ["machine.cloud=aws"], "machine.cloud=aws: --ssh rents nothing"),
        ({}, ["machine.disk_gb=1e9"], "GiB are free at .*--folder"),
        ({"stages": "prepare,rest"}, [], "--stages prepare,rest: of prepare,train,eval"),
    ],
)
def test_refused_in_one_line(
    box: Box, tmp_path: Path, given: dict[str, Any], words: list[str], message: str
) -> None:
    box.without("curl")
    args = box.args("name=no", "budget.steps=5", *words, runs=tmp_path / "runs", **given)
    with pytest.raises((UserError, Fault), match=message) as error:
        _launched(args)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
    assert not (box.home / "tuppence" / "no").exists()


def test_the_cards_of_the_machine(box: Box, tmp_path: Path) -> None:
    smi = box.tools / "nvidia-smi"
    smi.unlink(missing_ok=True)
    smi.write_text(
        "#!/bin/sh\nfor n in 0 1; do echo GPU $n: NVIDIA H100 80GB HBM3 '(UUID: GPU-1)'; done\n"
    )
    smi.chmod(0o755)

    def told(*words: str) -> tuple[dict[str, Any], list[str]]:
        asked = ("budget.hours=2", *words)
        return _launched(box.args(*asked, runs=tmp_path / "runs", dry_run=True))

    done, said = told("machine.gpu=H100-SXM", "machine.gpu_count=2")
    assert "2 x NVIDIA H100 80GB HBM3" in said[0]
    assert "2 h ($7.20)" in said[0]
    assert "--gpus 2" in done["job"]
    with pytest.raises(UserError, match=r"machine.gpu=L4: box has NVIDIA H100 80GB HBM3"):
        told("machine.gpu=L4")
    with pytest.raises(UserError, match=r"machine.gpu_count=4: box has 2"):
        told("machine.gpu_count=4")
    told("machine.gpu=L4", "machine.gpu=none")


def test_a_recipe_of_ones_own_travels(box: Box, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from tuppence.recipes import shakespeare\n\n\ndef small():\n    return shakespeare()\n"
    )
    args = box.args("budget.steps=5", "name=own", runs=tmp_path / "runs", dry_run=True)
    args.words[0] = f"{mine}:small"
    assert " own/mine.py:small " in _launched(args)[0]["job"]


def test_a_python_that_lacks_what_training_needs(box: Box, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = str(bare / "bin" / "python")
    args = box.args("budget.steps=5", runs=tmp_path / "runs", python=python)
    with pytest.raises(UserError, match="it lacks torch"):
        _launched(args)


def test_other_things_keep_their_place(box: Box, tmp_path: Path) -> None:
    (box.home / "tuppence" / "mine").mkdir()
    (box.home / "tuppence" / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other things"):
        _launched(box.args("name=mine", "budget.steps=5", runs=tmp_path / "runs"))
    (tmp_path / "runs" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "here" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is a run of this machine"):
        _launched(box.args("name=here", "budget.steps=5", runs=tmp_path / "runs"))


@pytest.mark.root
def test_a_disk_that_is_full_is_named(
    box: Box, tmp_path: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(small_disk(1) / "run")
    args = box.args("name=full", "budget.steps=5", runs=tmp_path / "runs", folder=folder)
    with pytest.raises(UserError, match=r"0\.0 GiB are free"):
        _launched(args)
    monkeypatch.setattr("tuppence.cloud.ssh_there.KIT_GIB", 0.0)
    with pytest.raises(UserError, match="no room on its disk"):
        _launched(args)


def test_a_login_shell_may_talk(box: Box) -> None:
    talks = box.tools / "bash"
    real = os.readlink(talks)
    talks.unlink()
    talks.write_text(f'#!{real}\necho "Welcome to box!"\nexec {real} "$@"\n')
    talks.chmod(0o755)
    told = Host("box", str(box.config)).ask("probe", "tuppence/x", sys.executable)
    assert told["system"] == ["Linux"]
    with Host("box", str(box.config)).stream("log", str(box.home)) as stream:
        assert b"".join(stream) == b""


# ---------------------------------------------------------------- text of one's own


def test_text_of_this_disk_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "more/c.txt"):
        (folder / name).write_text(name)
    assert own_text("shakespeare", "/there") is None
    assert own_text("s3://bucket/texts,hf://a/b", "/there") is None
    assert own_text("/on/that/machine.txt", "/there") is None
    one = own_text(f"{folder}/a.txt", "/there")
    assert one is not None
    assert one.source == f"{one.place}/00/a.txt"
    assert one.bytes == 5
    some = own_text(f"shakespeare,{folder},{folder}/*.txt", "/there")
    assert some is not None
    assert some.source == f"shakespeare,{some.place}/01,{some.place}/02"
    assert [name for name, _ in some.files] == [
        *("01/a.txt", "01/b.txt", "01/more/c.txt"),
        *("02/a.txt", "02/b.txt"),
    ]
    assert shlex.quote(one.place) == one.place
