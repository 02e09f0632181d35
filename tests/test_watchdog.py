"""The watchdog, in one process and among real ranks of which one sleeps or is stopped."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from forked import Forked

from tuppence.errors import Fault
from tuppence.train import watchdog
from tuppence.train.watchdog import EXIT_CODE, Known, Post, Watchdog, describe

SECONDS = 2.0
WORLD = 3
Start = Callable[..., list[Forked]]


def hang_here(what: str) -> None:
    if what == "sleep":
        time.sleep(600)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


def rank_of(rank: int, port: int, own: bool, what: str, who: int) -> None:
    """Twenty steps of a rank that reduces, in the seventh of which rank `who` does `what`."""
    master = own and rank == 0
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=master, wait_for_workers=False)
    group = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=WORLD)
    with Watchdog(
        rank=rank,
        world=WORLD,
        store=dist.PrefixStore("dog", store),
        seconds=SECONDS,
        told=lambda message: print("TOLD", message, flush=True),
    ) as dog:
        for step in range(20):
            dog.at("data", step)
            time.sleep(0.02)
            dog.at("forward", step)
            if (rank, step) == (who, 6):
                hang_here(what)
            dog.at("reduce", step)
            dist.all_reduce(torch.ones(10))
            dog.at("update", step)


@pytest.fixture
def ranks() -> Iterator[Start]:
    """Starts three ranks, in which rank `who` does `what` in its seventh step."""
    started: list[Forked] = []

    def start(what: str, who: int, *, port: int, own: bool) -> list[Forked]:
        started.extend(Forked(rank_of, rank, port, own, what, who) for rank in range(WORLD))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def a_store() -> dist.TCPStore:
    """A server of the test's own, as torchrun's agent has one."""
    return dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def told(process: Forked) -> tuple[str, str]:
    """What a rank told when it left for a restart, and its stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE, err
    lines = [line for line in out.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == 1, out + err
    return lines[0][5:], err


def test_a_rank_that_sleeps_is_named_with_its_place_and_all_leave(ranks: Start) -> None:
    store = a_store()
    processes = ranks("sleep", 1, port=store.port, own=False)
    messages, errors = zip(*(told(process) for process in processes), strict=True)
    hung = f"rank 1 (node {socket.gethostname()}, pid {processes[1].pid}) hung in forward of step 7"
    assert messages[0].startswith(f"{hung}, seen last ")
    assert "; ranks 0, 2 wait in reduce of step 7" in messages[0]
    assert "in hang_here" in errors[1]  # its own stack says where
    assert "all_reduce" in errors[0]


def test_a_rank_that_is_stopped_is_named_by_the_others(ranks: Start) -> None:
    store = a_store()
    processes = ranks("stop", 2, port=store.port, own=False)
    message, _ = told(processes[0])
    assert message.startswith("rank 2 (node ")
    assert f"pid {processes[2].pid}) stopped answering in " in message
    assert "; ranks 0, 1 wait in reduce of step 7" in message
    told(processes[1])
    assert processes[2].poll() is None
    processes[2].send_signal(signal.SIGCONT)  # it finds the others gone
    assert processes[2].wait(60) != 0


def test_where_rank_0_is_stopped_another_names_it(ranks: Start) -> None:
    store = a_store()
    processes = ranks("stop", 0, port=store.port, own=False)
    message = min(told(process)[0] for process in processes[1:])
    assert message.startswith("rank 0 (node ")
    assert f"pid {processes[0].pid}) stopped answering in " in message


def test_where_rank_0_takes_the_store_with_it_that_is_said(ranks: Start) -> None:
    processes = ranks("stop", 0, port=free_port(), own=True)
    for rank in (1, 2):
        message, _ = told(processes[rank])
        assert "the store that ranks meet in does not answer" in message
        assert "rank 0's node" in message
        assert f"rank {rank} waits in reduce of step 7" in message


# ---------------------------------------------------------------- in this process


class Alone:
    """A watchdog of one rank whose exit is noted here."""

    def __init__(self, seconds: float) -> None:
        self.told: list[str] = []
        self.left = threading.Event()
        self.dog = Watchdog(
            rank=0,
            world=1,
            store=None,
            seconds=seconds,
            told=self.told.append,
            leave=self.left.set,  # type: ignore[arg-type]
        )


def test_alone_it_names_itself_once(capfd: pytest.CaptureFixture[str]) -> None:
    alone = Alone(0.4)
    alone.dog.at("evaluate", 12)
    assert alone.left.wait(60)
    alone.dog.close()
    assert len(alone.told) == 1
    assert f"pid {os.getpid()}) hung in evaluate at 12, seen last " in alone.told[0]
    assert "test_alone_it_names_itself_once" in capfd.readouterr().err


def test_what_moves_or_may_take_long_is_left_alone() -> None:
    alone = Alone(1.0)
    for step in range(30):
        alone.dog.at("forward", step)
        time.sleep(0.05)
    alone.dog.at("save", 30, seconds=1000)
    time.sleep(2)
    assert alone.told == []
    alone.dog.at("data", 30)  # from here on as usual
    assert alone.left.wait(60)
    assert "in data of step 31" in alone.told[0]
    alone.dog.close()


def test_time_that_the_process_slept_through_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A paused process finds its clock an hour on when it wakes."""
    real, hour = time.monotonic, [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + hour[0])
    alone = Alone(100.0)
    hour[0] = 3600.0
    assert not alone.left.wait(3)
    alone.dog.close()


def test_it_leaves_although_nothing_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LAST_WORDS_SECONDS", 0.1)
    alone = Alone(0.4)
    never = threading.Event()
    alone.dog._told = lambda message: never.wait(60) and None
    assert alone.left.wait(60)
    alone.dog.close()
    never.set()


def fault(cause: Exception) -> Fault:
    """As the loop words it."""
    error = Fault("another rank is gone")
    error.__cause__ = cause
    return error


CLOSED = RuntimeError("closed by peer\nframe 1")


@pytest.mark.parametrize(
    ("error", "waited", "stall"),
    [
        (CLOSED, 600, True),
        (fault(CLOSED), 600, True),
        (CLOSED, 1, False),  # a rank that was killed
        (ValueError("no collective"), 600, False),
        (fault(OSError("disk full")), 600, False),
        (torch.OutOfMemoryError("compiled for long"), 600, False),
    ],
)
def test_an_error_after_a_long_wait_is_the_stalls_end(
    error: Exception, waited: float, stall: bool
) -> None:
    alone = Alone(1000)
    alone.dog._note = alone.dog._note._replace(monotonic=time.monotonic() - waited)
    with pytest.raises(type(error)), alone.dog:
        raise error
    assert alone.left.is_set() == stall
    ends = [
        message.endswith("(RuntimeError after 600 s: closed by peer)") for message in alone.told
    ]
    assert ends == [True] * stall


# ---------------------------------------------------------------- who is named


def post(rank: int, place: str, step: int = 6) -> Post:
    return Post(rank, place, step, "x", 100 + rank, 1000.0, 1)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (
            Known([post(0, "reduce"), post(1, "forward"), post(2, "reduce")]),
            "rank 1 (node x, pid 101) hung in forward of step 7, seen last 64 s ago; "
            "ranks 0, 2 wait in reduce of step 7",
        ),
        (  # all in one place: it is the one that is silent
            Known([post(0, "reduce"), post(1, "reduce"), post(2, "reduce")], silent=[2]),
            "rank 2 (node x, pid 102) stopped answering in reduce of step 7, seen last 64 s ago; "
            "ranks 0, 1 wait in reduce of step 7",
        ),
        (  # one has left the collective that the others are still in
            Known([post(0, "data", 7), post(1, "reduce"), post(2, "reduce")], silent=[1]),
            "rank 1 (node x, pid 101) stopped answering in reduce of step 7, seen last 64 s ago; "
            "rank 0 waits in data of step 8; rank 2 waits in reduce of step 7",
        ),
        (
            Known([post(0, "reduce"), post(1, "reduce")]),
            "every rank answers and none is behind: look at the network between them; "
            "ranks 0, 1 wait in reduce of step 7",
        ),
        (
            Known([post(0, "start", 0)], absent=[1]),
            "rank 1 never came; rank 0 waits in start at 0",
        ),
        (  # between steps comes before the next step
            Known([post(0, "evaluate", 7), post(1, "data", 7)]),
            "rank 0 (node x, pid 100) hung in evaluate at 7, seen last 64 s ago; "
            "rank 1 waits in data of step 8",
        ),
    ],
)
def test_who_is_named(known: Known, message: str) -> None:
    assert describe(known, now=1064.0) == message
