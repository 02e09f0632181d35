"""A launch that was agreed to: started, followed to its end, brought home, nothing left.

    launch.json ─▶ bucket ─▶ texts, code ─▶ the job ─▶ guarded to its end ─▶ fetched ─▶ verified

launch.json is ahead of everything: the name of what is made or asked for is in it before it is.
"""

import dataclasses
import secrets
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuppence import fetching, guarding
from tuppence.cloud import asked, kit, record, store_made, tasks
from tuppence.cloud.kit import Kit
from tuppence.cloud.launch import Launch
from tuppence.cloud.record import Job, Record
from tuppence.cloud.sky import Sky
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.files import try_lock
from tuppence.pipeline import say

Document = dict[str, Any]

LOOK_SECONDS = 15.0  # between looks at a job
LOCK = ".launch.lock"


@dataclass(frozen=True)
class Start:
    """What is started: the launch, what it needs on the store, and where launch.json goes."""

    args: Namespace
    launch: Launch
    folder: Path
    kit: Kit
    texts: asked.Texts | None
    before: Record | None


def go(start: Start, sky: Sky) -> Document:
    """Start it; follow it unless --detach. What was started before a failure is ended."""
    args, made = start.args, start.launch
    with _alone(start):
        found = _recorded(start, sky)
        try:
            found = _asked_for(start, _send(start, found), sky)
        except BaseException:
            _undo(start, sky, found.jobs[-1].name)
            raise
    say(f"started   {made.name}: SkyPilot's managed job {found.jobs[-1].job_id}")
    if args.detach:
        _say_how(made.name)
        say(f"guard     tuppence guard {made.name}, kept running, ends it when its money is spent")
        return _told(found, "started")
    return follow(args, start.folder, found, sky)


def warn_of_keys(made: Launch) -> None:
    """A session's keys end while the machines still need them."""
    hours = sum(stage.seconds for stage in made.stages) / 3600
    if "AWS_SESSION_TOKEN" in made.secrets and hours > 1:
        say(
            f"warning   AWS_SESSION_TOKEN: keys of a session end within hours, and this takes "
            f"{hours:.1f}; without them nothing is saved: use keys that stay"
        )


@contextmanager
def _alone(start: Start) -> Iterator[None]:
    """No two launches of one name at once: launch.json would lose the first one's job. Raises
    UserError where another is at it, or was since the plan was shown."""
    start.folder.mkdir(parents=True, exist_ok=True)
    name, refused = start.launch.name, "tuppence status {0} shows it, tuppence stop {0} ends it"
    with (start.folder / LOCK).open("a+b") as file:
        if not try_lock(file):
            raise UserError(f"{name} is being launched already: {refused.format(name)}")
        if record.read(start.folder) != start.before:
            raise UserError(f"{name} was launched or ended meanwhile: {refused.format(name)}")
        yield  # closing the file lets go of the lock


def _asked_for(start: Start, found: Record, sky: Sky) -> Record:
    """Hand the tasks over. A `stop` while things were sent found no job to cancel: it is looked for
    before the job and after it."""
    made = start.launch
    found = _with_job(found, asked_at=time.time())
    _written(start, found)
    text = tasks.yaml_text(tasks.documents(made), made)
    job = sky.launch(text, name=found.jobs[-1].name, secrets=made.secrets)
    found = replace(_with_job(found, job_id=job), state="started")
    _written(start, found)
    return found


def _with_job(found: Record, **change: Any) -> Record:
    return replace(found, jobs=(*found.jobs[:-1], replace(found.jobs[-1], **change)))


def _written(start: Start, found: Record) -> None:
    """launch.json anew, unless the launch was stopped meanwhile. Raises UserError."""
    now = record.read(start.folder)
    if now is None or now.state == "stopped":
        raise UserError(f"{found.name} was stopped while it was launched: nothing of it goes on")
    record.write(start.folder, found)


def _recorded(start: Start, sky: Sky) -> Record:
    """launch.json, before anything is made: with the name of the job that will be asked for."""
    before, name = start.before, start.launch.name
    job = Job(f"{name}-{secrets.token_hex(3)}", None, time.time())
    found = Record(
        version=record.VERSION,
        kind="sky",
        state="planned",
        launch=start.launch,
        created_at=before.created_at if before else time.time(),
        sky=str(sky.python),
        jobs=(*(before.jobs if before else ()), job),
        made=before.made if before else (),
    )
    record.write(start.folder, found)
    return found


def _send(start: Start, found: Record) -> Record:
    """The bucket, the texts and the code. What is made stands in launch.json before it is."""
    store, made = start.launch.store, start.launch
    if not store_made.there(store):
        found = _noting(start, found, store)
        train = next(stage for stage in made.stages if "train" in stage.does).machines[0]
        same = train.cloud == store_made.cloud_of(store)
        if store_made.make(store, region=train.region if same else None):
            say(f"made      {store}")
    if not store_made.holds(store, f"runs/{made.name}"):
        found = _noting(start, found, f"{store}/runs/{made.name}")
    if start.texts is not None and not start.texts.sent(store):
        found = _noting(start, found, f"{store}/{start.texts.folder}")
        start.texts.send(store)
        say(f"sent      {len(start.texts.files)} file(s) of text to {store}/{start.texts.folder}")
    if not store_made.holds(store, f"kit/{made.kit}"):
        found = _noting(start, found, kit.place_of(store, made.kit))
    if kit.send_kit(store, start.kit):
        say(f"sent      the code to {kit.place_of(store, made.kit)}")
    mark = store_made.mark(made)
    found = _noting(start, found, f"{store}/{mark}")
    store_made.opened(store).write(f"{mark}/used", b"")
    return found


def _noting(start: Start, found: Record, url: str) -> Record:
    if url in found.made:
        return found
    found = replace(found, made=(*found.made, url))
    _written(start, found)
    return found


def _undo(start: Start, sky: Sky, job: str) -> None:
    """A launch that failed before it had a job: nothing may be left of it, and it is said."""
    name = start.launch.name
    try:
        left = guarding.end(start.folder, sky, say=say, why="the launch failed")
        for each in sky.look([job]).controllers:
            if each.status != "STOPPED":
                say(
                    f"SkyPilot's own machine {each.name} is {each.status}, and is billed: "
                    f"`{sky.tool} down {each.name}` ends it"
                )
    except (UserError, DoesNotFit, Fault, OSError) as error:
        left = [f"what it is cannot be told: {error}"]
    if left:
        say(f"left      {', '.join(left)}: tuppence stop {name} ends it")
        return
    say(f"ended     nothing of {name} runs; tuppence stop {name} --bucket deletes what was sent")


# ---------------------------------------------------------------- followed


def follow(args: Namespace, folder: Path, found: Record, sky: Sky) -> Document:
    """To its end, guarded; then its run is brought here, and nothing may be left. Ctrl-C leaves it
    running. Raises DoesNotFit or Fault where it failed."""
    name = found.name
    say("following it and its money; Ctrl-C leaves it running, without a guard from here")
    try:
        now = guarding.watch_launch(folder, sky, say=say, every=LOOK_SECONDS)
    except KeyboardInterrupt:
        say(f"\n{name} goes on, and costs money")
        _say_how(name)
        return _told(found, "running")
    left = guarding.end(folder, sky, say=say, why="it is over")
    if left:
        raise Fault(f"still held: {', '.join(left)}; tuppence stop {name} takes it down")
    found = record.read(folder) or found
    if now.state != "finished":
        failure = now.failure or f"{name} has {now.state}"
        raise Fault(f"{failure}; nothing of it is left running: tuppence logs {name} says more")
    record.write(folder, replace(found, state="finished"))
    document = fetching.bring(found, folder, checkpoint="best", args=args)
    say(f"nothing is left running; {_stays(found)}")
    return {**_told(found, "finished"), "receipt": document}


def _stays(found: Record) -> str:
    """What lies on the store still, for how much."""
    try:
        stored = store_made.stored(found.launch)
    except (OSError, UserError) as error:
        return f"what is stored cannot be told now: {error}"
    return store_made.words(stored, found.launch.store)


def _say_how(name: str) -> None:
    say(
        f"look      tuppence status {name}; tuppence logs {name} --follow\n"
        f"end it    tuppence stop {name}\n"
        f"bring it  tuppence fetch {name}"
    )


def _told(found: Record, state: str) -> Document:
    return {
        "name": found.name,
        "state": state,
        "run_url": found.run_url,
        "jobs": [dataclasses.asdict(job) for job in found.jobs],
        "launch": dataclasses.asdict(found.launch),
    }
