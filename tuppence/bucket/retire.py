"""What may go from the bucket: what was deleted here, and what earlier attempts left.

Nothing goes before something newer is complete there, and nothing that a pointer names. An attempt
deletes below its own name and those of earlier attempts, never of a newer one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from tuppence.bucket.layout import MARKER, STEP, Remote

Age = tuple[int, int]


@dataclass(frozen=True)
class Standing:
    """How far a mirror has come."""

    mine: str  # the attempt's prefix
    attempt: int
    here: list[str]  # complete in the folder, newest first
    sent: Mapping[str, Age]  # complete on the bucket, below this prefix
    refused: Collection[str]  # damaged in the folder
    best: str | None  # what the folder's pointer names
    pointed: Collection[str]  # what the bucket's pointers name
    left: Mapping[str, str]  # only on the bucket: the prefix by name

    @property
    def caught_up(self) -> bool:
        return bool(self.here) and self.here[0] in self.sent


def doomed(there: Remote, now: Standing, is_milestone: Callable[[str], bool]) -> list[str]:
    """Names of the objects that go, markers first."""
    if not now.sent:
        return []
    found = [*_deleted_here(there, now)]
    newest_attempt, _ = max(now.sent.values())
    ahead = now.caught_up or newest_attempt == now.attempt
    if ahead and now.best in {None, *now.sent, *now.refused}:
        found += _of_others(there, now, is_milestone)
    return sorted(found, key=lambda name: not name.endswith(f"/{MARKER}"))


def _deleted_here(there: Remote, now: Standing) -> Iterator[str]:
    """Checkpoints, whole or begun, that the folder has no more.

    Where uploads do not keep up with saves, the newest here is never there: then what is older than
    the newest there goes. After a rewind that one is the newer by its step, and goes with the next.
    """
    start, newest = f"{now.mine}/checkpoints/", max(now.sent.values())
    for name in there.objects:
        step, slash, _ = name.removeprefix(start).partition("/")
        if not (name.startswith(start) and slash and STEP.fullmatch(step)):
            continue
        older = now.sent.get(step, (0, 0)) < newest
        if step not in {*now.here, *now.pointed, now.best} and (now.caught_up or older):
            yield name


def _of_others(there: Remote, now: Standing, is_milestone: Callable[[str], bool]) -> Iterator[str]:
    """All but milestones that restore left there, and what is only damaged here.

    What it left besides milestones goes when there is a second checkpoint to fall back on.
    """
    alone = len(now.sent) < 2
    for prefix in there.prefixes():
        left = {name for name, place in now.left.items() if place == prefix}
        names = {name for name in left if alone or is_milestone(name)} | {*now.refused}
        kept = {f"{prefix}/checkpoints/{name}" for name in names}
        for name in there.objects if prefix < now.mine else ():
            if name.startswith(f"{prefix}/") and name.rpartition("/")[0] not in kept:
                yield name
