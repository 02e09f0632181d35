"""Who may work at one preparation at the same time.

    a whole one, or a merge    nobody else, in this folder
    rank R of N                other ranks of the same N; every slice has one that makes it

Locks keep processes apart that see one folder. Machines that only share a bucket are told apart by
the note there, of how many they are: two that begin at the same moment with other numbers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tuppence.data.shelf import Shelf
from tuppence.errors import UserError
from tuppence.files import locked, try_lock

WORLD = "slice_world"  # the note; it goes when the slices go

Say = Callable[[str], None]


@contextmanager
def alone(folder: Path, *, say: Say) -> Iterator[None]:
    """Nobody else prepares the same here. Raises UserError where a rank does."""

    def on_wait() -> None:
        _refuse_ranks(folder)
        say("waiting for another process that prepares the same")

    with locked(_lock(folder), on_wait=on_wait):
        yield


@contextmanager
def one_rank(folder: Path, rank: int, *, say: Say) -> Iterator[None]:
    """No whole preparation, and no other process of this rank, works here."""
    whole = partial(say, "waiting for the process that prepares all of it")
    same = partial(say, "waiting for this rank's other process")
    with (
        locked(_lock(folder), on_wait=whole, shared=True),
        locked(_lock(folder, f".rank{rank}"), on_wait=same),
    ):
        yield


def agree(folder: Path, shelf: Shelf, world: int) -> None:
    """Raises UserError where the slices here are shared by another number of machines."""
    with locked(_lock(folder, ".world"), on_wait=lambda: None):
        found = world_of(shelf)
        if found is None:
            shelf.note(WORLD, str(world).encode())
        elif found != world:
            raise UserError(
                f"{shelf.place}: its slices are shared by {found} machines, not {world}; say "
                f"--world {found} (one machine may make several ranks), or delete it"
            )


def world_of(shelf: Shelf) -> int | None:
    """How many machines share the slices; None where no rank has begun."""
    found = shelf.noted(WORLD)
    return None if found is None else int(found)


def has_ranks(folder: Path) -> bool:
    """Whether ranks have worked here."""
    return any(_rank_locks(folder))


def _refuse_ranks(folder: Path) -> None:
    for path in _rank_locks(folder):
        with path.open("a+b") as file:
            if not try_lock(file):
                rank = path.name.removesuffix(".lock").rpartition("rank")[2]
                raise UserError(
                    f"rank {rank} of this preparation is at work in {folder.parent}; wait for it"
                )


def _rank_locks(folder: Path) -> Iterator[Path]:
    return folder.parent.glob(f".{folder.name}.rank*.lock")


def _lock(folder: Path, name: str = "") -> Path:
    return folder.with_name(f".{folder.name}{name}.lock")
