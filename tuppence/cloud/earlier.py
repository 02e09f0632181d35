"""What was launched under a name before: it runs, it is finished, or it goes on."""

from dataclasses import replace
from pathlib import Path

from tuppence import bucket
from tuppence.cloud import record
from tuppence.cloud.record import Record
from tuppence.cloud.sky import Sky
from tuppence.errors import DoesNotFit, UserError
from tuppence.folder import RunFolder
from tuppence.store import is_url

SPENT = 0.97  # of a budget: what is left buys no machine's boot


def is_over(folder: Path, before: Record | None, sky: Sky) -> bool:
    """Whether the run was launched before and is finished. Raises UserError where it still runs or
    its folder is another run's, DoesNotFit where it has spent its budget."""
    if before is None:
        if (folder / "run.json").exists():
            raise UserError(
                f"{folder} holds a run that was not launched; give this one a name (name=...)"
            )
        return False
    if before.kind != "sky":
        raise UserError(f"{folder} was launched by --ssh; give this one a name (name=...)")
    if before.state == "finished":
        return True
    rows = [row for job in before.jobs for row in sky.queue(job.name)]
    if any(not row.finished for row in rows):
        raise UserError(
            f"{before.name} runs already: tuppence status {before.name} shows it, tuppence stop "
            f"{before.name} ends it"
        )
    last = [row for row in rows if row.name == before.jobs[-1].name]
    if last and all(row.status == "SUCCEEDED" for row in last):
        record.write(folder, replace(before, state="finished"))
        return True
    if not rows and before.launch.tasks is None and _has_ended(before):
        record.write(folder, replace(before, state="finished"))
        return True  # SkyPilot's machine that watched it was stopped, and tells of no job
    _check_left(before)
    return False


def _check_left(before: Record) -> None:
    """Refuse to rent a machine for what is left of a budget that is spent."""
    usd, hours = spent(before)
    budget = before.launch.budget
    for limit, paid, unit in ((budget.usd, usd, "$"), (budget.hours, hours, "hours ")):
        if limit is not None and paid >= SPENT * limit:
            raise DoesNotFit(
                f"{before.name} has spent {unit}{paid:.2f} of {unit}{limit:.2f}: too little is "
                f"left to rent a machine for; tuppence fetch {before.name} brings what it made"
            )


def _folder(before: Record) -> RunFolder | None:
    """The run on the store; None where nothing of it is there yet."""
    try:
        if is_url(before.run_url):
            return bucket.onlooker(before.run_url, brief=True).look()
        return RunFolder(Path(before.run_url))
    except UserError:
        return None


def _has_ended(before: Record) -> bool:
    folder = _folder(before)
    return folder is not None and any(row["code"] == "end" for row in folder.rows("events"))


def spent(before: Record) -> tuple[float, float]:
    """Dollars and hours that the run's ledger on the store has; none where there is no run yet."""
    folder = _folder(before)
    rows = list(folder.rows("ledger")) if folder is not None else []
    usd = sum(row["usd"] for row in rows)
    return usd, sum(row["end"] - row["start"] for row in rows) / 3600
