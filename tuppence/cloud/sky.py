"""SkyPilot, asked by subprocess: it lives in an environment of its own.

    Sky.ask("queue", name=...)  ──JSON──▶  PYTHON assets/sky_driver.py queue  ──▶ API server, clouds
              ▲                                          │
              └── a document, or one clear line ◀────────┘    its chatter: "sky | ..." on stderr

The environment is made on first use (sky_environment.py), or is one that a person has.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from tuppence.cloud.launch import Rented
from tuppence.cloud.sky_environment import VERSION, environment
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.files import asset

ASK_SECONDS = 300.0  # the longest that a question takes: a `sky check` of many clouds
LONG_SECONDS = 3600.0  # a launch waits for the controller's machine, a `down` for the cloud
MESSAGE_CHARS = 400
LAST_SECONDS = 15.0  # for a driver that was interrupted
LINES_KEPT = 20
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LONG = ("launch", "down", "cancel")
LOUD = ("launch", "down")  # whose lines a person wants to see as they come

T = TypeVar("T")


class Unreachable(Fault):
    """SkyPilot's server, or what it asked, gave no answer: it may do so later."""


@dataclass(frozen=True)
class Job:
    """One task of a managed job. Times are seconds since the epoch; `job_duration` is SkyPilot's,
    from the moment the machine was up, without recoveries; `recovered_at` of the last one."""

    job_id: int
    task_id: int
    name: str
    task: str
    status: str
    finished: bool
    cluster: str
    resources: str | None
    machine: str | None
    cloud: str | None
    region: str | None
    submitted_at: float | None
    start_at: float | None
    end_at: float | None
    recovered_at: float | None
    job_duration: float | None
    recoveries: int
    failure: str
    details: str


@dataclass(frozen=True)
class Cluster:
    """Machines that are held now; `usd_per_hour` of all nodes, by the catalog."""

    name: str
    status: str
    launched_at: float
    resources: str | None
    cloud: str | None
    region: str | None
    nodes: int
    usd_per_hour: float | None
    autostop: int | None
    down: bool
    managed: bool


@dataclass(frozen=True)
class Cost:
    """SkyPilot's meter of one cluster that was up: each recovery is another. `intervals` are
    [start, end], the last end None while it is up."""

    name: str
    status: str | None
    seconds: float
    usd: float
    nodes: int
    cloud: str | None
    region: str | None
    resources: str | None
    intervals: tuple[tuple[float, float | None], ...]
    hash: str | None


@dataclass(frozen=True)
class Quote:
    """A machine's price by the catalog now: of the cheapest region that was asked for, and by
    region. None: it is not for rent there, and `why`."""

    usd_per_hour: float | None
    regions: dict[str, float]
    instance_type: str | None
    why: str | None


@dataclass(frozen=True)
class Look:
    """What SkyPilot knows of some jobs: their tasks, what they hold now, and what they cost; and
    the machines that watch managed jobs, where there are any."""

    jobs: tuple[Job, ...]
    clusters: tuple[Cluster, ...]
    controllers: tuple[Cluster, ...]
    costs: tuple[Cost, ...]


# ---------------------------------------------------------------- the one who is asked


@dataclass(frozen=True)
class Sky:
    """SkyPilot, by the Python that has it."""

    python: Path

    def ask(self, verb: str, *, wait: float | None = None, **payload: Any) -> dict[str, Any]:
        """The answer to one question, in `wait` seconds at most.

        Raises Unreachable where there is none, else UserError, DoesNotFit or Fault in one line.
        """
        wait = wait or (LONG_SECONDS if verb in LONG else ASK_SECONDS)
        code, out, said = _run(self._command(verb), payload, wait=wait, loud=verb in LOUD)
        try:
            found = json.loads(out)
        except ValueError:
            raise Fault(f"SkyPilot ({self.python}): {_last(said, code)}") from None
        if not isinstance(found, dict):
            raise Fault(f"SkyPilot ({self.python}) answered {verb} with no document")
        if error := found.get("error"):
            _refuse(str(error["code"]), str(error["message"]), self)
        return found

    def _command(self, verb: str) -> list[str]:
        return [str(self.python), str(asset("sky_driver.py")), verb]

    @property
    def tool(self) -> str:
        """The `sky` command beside this Python, for sentences that tell a person to call it."""
        beside = self.python.with_name("sky")
        return str(beside) if beside.exists() else "sky"

    def version(self) -> dict[str, Any]:
        """Of the library and of what answers for it; starts nothing."""
        return self.ask("version")

    def enabled(self, clouds: Iterable[str] = ()) -> tuple[frozenset[str], dict[str, str]]:
        """Clouds whose credentials work, and why the others' do not."""
        found = self.ask("enabled", clouds=sorted(clouds))
        return frozenset(found["clouds"]), found["why_not"]

    def quote(self, machines: Sequence[Rented]) -> list[Quote]:
        """What each machine costs now."""
        found = self.ask("quote", machines=[dataclasses.asdict(each) for each in machines])
        return [_read(Quote, row) for row in found["machines"]]

    def launch(self, yaml: str, *, name: str, secrets: Sequence[str] = ()) -> int:
        """Hand the tasks over as one managed job; its number. `secrets` are names of variables of
        this process's environment."""
        if lacking := [each for each in secrets if each not in os.environ]:
            raise UserError(f"{lacking[0]} is not set here; the machines need it: export it")
        found = self.ask("launch", yaml=yaml, name=name, secrets=list(secrets))
        if found["job_id"] is None:
            raise Fault(f"SkyPilot took {name} and gave it no number; `{self.tool} jobs queue`")
        return int(found["job_id"])

    def queue(self, name: str) -> list[Job]:
        """The tasks of the job of this name, in their order, finished or not."""
        return _jobs(self.ask("queue", name=name)["jobs"])

    def look(self, names: Sequence[str], *, refresh: bool = False) -> Look:
        """All that a guard wants to know of jobs of these names; `refresh`: as the clouds say."""
        found = self.ask("look", names=list(names), refresh=refresh)
        return Look(
            jobs=tuple(_jobs(found["jobs"])),
            clusters=tuple(_read(Cluster, row) for row in found["clusters"]),
            controllers=tuple(_read(Cluster, row) for row in found["controllers"]),
            costs=tuple(_costs(found["costs"])),
        )

    def cancel(self, name: str) -> dict[str, Any]:
        """Cancel the job of this name, and a launch of it that is still on its way."""
        return self.ask("cancel", name=name)

    def down(self, cluster: str) -> None:
        """Take a cluster down; none is left when this returns."""
        self.ask("down", cluster=cluster)

    def logs(
        self, row: Job, *, ended: bool = False, follow: bool = False, tail: int | None = None
    ) -> int:
        """A task's text to stdout as it comes; SkyPilot's code: 0 where the job ended well.
        `ended`: the task is over, and its job is not."""
        which: dict[str, Any] = {"job_id": row.job_id, "task": row.task_id, "ended": ended}
        payload = {**which, "follow": follow, "tail": tail}
        code, _, said = _run(self._command("logs"), payload, wait=None, loud=False, out=sys.stdout)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            error = json.loads(said[-1] if said else "")["error"]
            _refuse(str(error["code"]), str(error["message"]), self)
        return code


def _jobs(rows: list[dict[str, Any]]) -> list[Job]:
    return sorted((_read(Job, row) for row in rows), key=lambda job: (job.job_id, job.task_id))


def _costs(rows: list[dict[str, Any]]) -> list[Cost]:
    spans = [tuple(tuple(each) for each in row["intervals"]) for row in rows]
    return [_read(Cost, {**row, "intervals": s}) for row, s in zip(rows, spans, strict=True)]


def _read(kind: type[T], row: dict[str, Any]) -> T:
    """What the driver says more is of a later one."""
    names = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in row.items() if key in names})


def _run(
    command: list[str],
    payload: dict[str, Any],
    *,
    wait: float | None,
    loud: bool,
    out: IO[str] | None = None,
) -> tuple[int, str, list[str]]:
    """Exit code, stdout (unless it goes to `out`), and the last lines of stderr."""
    said: deque[str] = deque(maxlen=LINES_KEPT)
    found: list[str] = []
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        )
    except OSError as error:
        raise UserError(f"--sky {command[0]}: cannot be started: {error.strerror}") from None
    assert child.stdin is not None and child.stdout is not None  # noqa: PT018
    readers = [
        threading.Thread(target=_hear, args=(child.stderr, said, loud), daemon=True),
        threading.Thread(target=_collect, args=(child.stdout, found, out), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once: stderr says why
            child.stdin.write(json.dumps(payload))
            child.stdin.close()
        child.wait(wait)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"SkyPilot gave no answer to {command[-1]} in {wait:g} s") from None
    except KeyboardInterrupt:  # it takes back what it asked of the server
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LAST_SECONDS)
        raise
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for reader in readers:
            reader.join(5.0)  # a server that it started may keep the pipe open
    return child.returncode, "".join(found), list(said)


def _hear(lines: IO[str], said: deque[str], loud: bool) -> None:
    with lines:
        for line in lines:
            text = ANSI.sub("", line).rstrip()
            said.append(text)
            if loud and text:
                sys.stderr.write(f"sky | {text}\n")
                sys.stderr.flush()


def _collect(lines: IO[str], found: list[str], out: IO[str] | None) -> None:
    with lines:
        for line in lines:
            if out is None:
                found.append(line)
            else:
                out.write(line)
                out.flush()


def _last(said: list[str], code: int) -> str:
    """Why there was no answer: the last line of a traceback says most."""
    lines = [line for line in said if line.strip()]
    return lines[-1][-MESSAGE_CHARS:] if lines else f"ended with code {code} and said nothing"


# ---------------------------------------------------------------- one clear line


def _refuse(code: str, message: str, sky: Sky) -> NoReturn:
    """The error of that code, with the remedy."""
    text = message if len(message) <= MESSAGE_CHARS else message[: MESSAGE_CHARS - 1] + "…"
    if code == "away":
        raise Unreachable(f"SkyPilot's API server gives no answer: {text}")
    if code == "no_capacity":
        raise DoesNotFit(f"no capacity now: {text}; try other machines, or later")
    if code == "no_machine":
        raise UserError(f"no cloud has this machine: {text}; `tuppence plan --all` lists machines")
    if code == "quota":
        raise UserError(f"quota: {text}; ask the cloud for quota, or choose another machine")
    if code == "no_credentials":
        raise UserError(f"no credentials: {text}; `{sky.tool} check` says what each cloud lacks")
    if code == "login":
        raise UserError(f"SkyPilot's API server wants a login: {text}; `{sky.tool} api login`")
    if code == "version":
        remedy = f"`{sky.tool} api stop`, then `{sky.tool} api start`"
        raise UserError(f"SkyPilot's API server is of another version: {text}; {remedy}")
    if code == "no_sky":
        raise UserError(f"--sky {sky.python}: has no SkyPilot; pip install skypilot=={VERSION}")
    if code in ("refused", "config", "unsupported", "storage"):
        raise UserError(f"SkyPilot refuses: {text}")
    raise Fault(f"SkyPilot: {text}")


# ---------------------------------------------------------------- found


def found(python: str | None = None) -> Sky:
    """SkyPilot by a Python that a person named, else by the one made here on first use."""
    if python is None:
        return Sky(environment())
    path = shutil.which(python) or python
    if not Path(path).is_file():
        raise UserError(f"--sky {python}: no such Python; name one that can `import sky`")
    sky = Sky(Path(path).absolute())  # not resolved: a venv's python is a link
    version = str(sky.version()["version"])
    if version.split(".")[:2] != VERSION.split(".")[:2]:
        raise UserError(f"--sky {python}: SkyPilot {version}; tuppence was written for {VERSION}")
    return sky
