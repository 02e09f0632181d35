"""A launch on a machine of one's own, once it was started: where it stands, its log, its end."""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tuppence.cloud import record as records
from tuppence.cloud.record import Record
from tuppence.cloud.ssh_files import bring_run
from tuppence.cloud.ssh_host import Host, Lost
from tuppence.errors import DoesNotFit, Fault, UserError

STOP_SECONDS = 90  # that a trainer may take to save
RETRY_SECONDS = (1, 2, 5, 10, 30)  # after a lost connection; the last again and again
SIGNALLED = (130, 137, 143)
DEAD_MAN = 124
WHY = {
    DEAD_MAN: "its dead-man timer stopped it: the money or the time was spent",
    75: "a rank stood still, or another job works in its folder",
}


def host_of(record: Record) -> Host:
    return Host(record.ssh["host"], record.ssh["config"] or None)


# ---------------------------------------------------------------- where it stands


def ssh_status(record: Record) -> dict[str, Any]:
    """Where the job stands, as the machine says now. Raises Lost where it cannot be reached."""
    where = record.ssh
    told = host_of(record).ask("status", where["folder"], where["job"], record.name)
    one = {key: values[-1] for key, values in told.items()}
    state = standing(one, where["job"])
    return {
        "run": record.name,
        "kind": "ssh",
        **{key: where[key] for key in ("host", "folder", "how", "job")},
        **state,
        **_money(one, state, float(where["usd_per_hour"])),
        "budget": dataclasses.asdict(record.launch.budget),
    }


def standing(told: dict[str, str], job: str) -> dict[str, Any]:
    """The state of a job: running, finished, stopped, failed, lost (it was killed, or the machine
    was), or not started."""
    code, when = None, None
    if "ended" in told:
        code, when = map(int, told["ended"].split())
    if int(told.get("running") or 0):
        state = "running"
    elif code is not None:
        state = "finished" if code == 0 else "stopped" if code in SIGNALLED else "failed"
    else:
        state = "lost" if told.get("job") == job else "not started"
    since = int(told["since"]) if told.get("since") else None
    until = when if when is not None and state != "running" else int(told.get("now") or 0)
    metrics = _line(told.get("metrics"))
    return {
        "state": state,
        "exit_code": code,
        "since": since,
        "seconds": None if since is None else max(0, until - since),
        "step": metrics.get("step"),
        "loss": metrics.get("loss"),
        "last": told.get("last"),
        "log_bytes": int(told.get("log_bytes") or 0),
    }


def _money(told: dict[str, str], state: dict[str, Any], price: float) -> dict[str, Any]:
    """Charged so far: by the run's ledger, else (it lives on a bucket, or has not begun) by the
    clock since the job's start."""
    usd = float(told.get("ledger_usd") or 0.0)
    usd += _line(told.get("heartbeat")).get("usd", 0.0)
    by = "ledger"
    if not usd:
        usd, by = (state["seconds"] or 0) / 3600 * price, "clock"
    return {"usd": usd, "usd_by": by, "usd_per_hour": price}


def _line(text: str | None) -> dict[str, Any]:
    """A row as it was read; nothing where it was being written just then."""
    try:
        found: dict[str, Any] = json.loads(text or "{}")
    except ValueError:
        return {}
    return found


# ---------------------------------------------------------------- its log


def ssh_logs(record: Record, *, follow: bool, tail: int | None, out: BinaryIO) -> None:
    """Write the log to `out`: its last `tail` lines or all, and then as it grows until the job has
    ended. A lost connection is made again."""
    where, host, at = record.ssh, host_of(record), 0
    lines: deque[bytes] = deque(maxlen=tail)
    with host.stream("log", where["folder"]) as stream:
        for line in stream.file():
            at += len(line)
            if tail is None:
                out.write(line)
            else:
                lines.append(line)
        stream.check()
    out.writelines(lines)
    out.flush()
    if follow:
        grow(record, at, out, say=lambda text: None)


def grow(record: Record, at: int, out: BinaryIO, say: Callable[[str], None]) -> None:
    """Write the log from byte `at` on until the job has ended, through lost connections."""
    where, host, lost = record.ssh, host_of(record), 0
    while True:
        with host.stream("follow", where["folder"], where["job"], str(at)) as stream:
            for block in stream:
                out.write(block)
                out.flush()
                at, lost = at + len(block), 0
            if not stream.lost:
                stream.check()
                return
        if not lost:
            say(f"the connection to {host.name} is lost; {record.name} goes on there; trying again")
        time.sleep(RETRY_SECONDS[min(lost, len(RETRY_SECONDS) - 1)])
        lost += 1


def followed(
    folder: Path, record: Record, at: int, out: BinaryIO, say: Callable[[str], None]
) -> dict[str, Any]:
    """Watch it to its end, and bring the run here. Raises what the trainer's exit code says."""
    name, host = record.name, record.ssh["host"]
    try:
        grow(record, at, out, say)
        status = _at_last(record)
    except KeyboardInterrupt:
        say(f"{name} goes on on {host}: tuppence logs {name} --follow, tuppence stop {name}")
        return {"run": name, "kind": "ssh", "host": host, "state": "running"}
    if status["state"] == "finished":
        records.write(folder, dataclasses.replace(record, state="finished"))
    if "://" not in record.launch.store:
        _bring(record, folder, say)
    if status["state"] != "finished":
        raise _why(record, status)
    return status


def _at_last(record: Record) -> dict[str, Any]:
    """The status, however long the machine cannot be reached."""
    for seconds in (*RETRY_SECONDS, *RETRY_SECONDS[-1:] * 20):
        try:
            return ssh_status(record)
        except Lost:
            time.sleep(seconds)
    return ssh_status(record)


def _bring(record: Record, folder: Path, say: Callable[[str], None]) -> None:
    try:
        done = ssh_fetch(record, folder)
    except UserError as error:  # it ended before there was a run
        say(str(error))
        return
    say(f"{folder}: {done['files']} files, {done['bytes'] / 1e6:.1f} MB brought from the machine")


def _why(record: Record, status: dict[str, Any]) -> Exception:
    """The error of a job that did not finish, with the trainer's own exit code."""
    code, host = status["exit_code"], record.ssh["host"]
    said = WHY.get(code) or (status["last"] or "").removeprefix("tuppence: ")
    text = f"{record.name} failed on {host}: {said}"
    if status["state"] == "lost":
        return Fault(
            f"{record.name} was killed on {host}, or the machine was restarted; the same command "
            f"goes on from the newest checkpoint"
        )
    if status["state"] == "stopped":
        return Fault(f"{record.name} was stopped on {host}; the same command goes on where it was")
    return {2: UserError, 3: DoesNotFit}.get(code, Fault)(text)


# ---------------------------------------------------------------- its end, and home


def ssh_stop(record: Record, *, clean: bool = False) -> dict[str, Any]:
    """End the job: it may save, then all of its processes are killed. Asked again afterwards
    whether one is left. `clean` removes the folder there, and the environments where no other run
    uses them. Of a job that is over, or never began, the same."""
    where, host = record.ssh, host_of(record)
    before = ssh_status(record)
    told = host.ask("stop", where["folder"], where["job"], str(STOP_SECONDS))
    left = int(told["running"][-1]) if "running" in told else 0
    if left:
        raise Fault(f"{host.name}: {left} process(es) of {record.name} cannot be ended; look there")
    if clean:
        host.ask("clean", where["folder"])
    return {**before, "was": before["state"], "left": left, "cleaned": clean}


def ssh_fetch(record: Record, to: Path, *, checkpoint: str = "best") -> dict[str, int]:
    """Bring the run folder into `to`: documents, and one checkpoint."""
    assert "://" not in record.launch.store, "a bucket is fetched from directly"
    where = record.ssh
    return bring_run(host_of(record), where["folder"], record.name, to, checkpoint=checkpoint)
