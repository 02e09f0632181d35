"""What assets/node.sh needs Python for: `python -m tuppence.node VERB ...`.

    check --store S --gpus N    is there all that training needs? one line and exit 2 where not
    held FOLDER ...             writes held.json and the first deadline.json, prints the price
    rank FILE VERB ...          a rank of torchrun, which leaves its exit code in FILE
    pack ENVIRONMENT PLACE NAME     the environment as a tar on the store
    send-evaluations URL        results of `eval` to the run's place on the bucket
    moves PLACE NAME --most N   exit 0 where a run may ask for one more machine, and counts it
    charge RUN FOLDER           what a trainer that was killed could not write into its ledger

All of it is called by that script and by nobody else, so the words are checked no further.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuppence import held
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.files import write_whole
from tuppence.folder import RunFolder, RunLock
from tuppence.held import Held
from tuppence.store import Away, Store, is_url

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "tiktoken", "pyarrow")
BUCKET = {"s3": ("fsspec", "s3fs"), "gs": ("fsspec", "gcsfs")}
SEND_SECONDS = 20.0  # for the last lines of a ledger
PRICES, WHERE, COUNT = "TUPPENCE_PRICES", "SKYPILOT_CLUSTER_INFO", "SKYPILOT_NUM_GPUS_PER_NODE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["rank"]:
        return rank(Path(words[1]), words[2:])
    args = _parser().parse_args(words)
    try:
        args.act(args)
    except (UserError, DoesNotFit, Fault) as error:
        sys.stderr.write(f"tuppence: {error}\n")
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tuppence.node", description=__doc__)
    verbs = parser.add_subparsers(required=True)

    def verb(name: str, act: Any, *places: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name)
        sub.set_defaults(act=act)
        for place in places:
            sub.add_argument(place)
        return sub

    one = verb("check", check)
    one.add_argument("--store", required=True)
    one.add_argument("--gpus", type=int, default=0)
    one = verb("held", tell_held, "folder")
    one.add_argument("--since", type=float, required=True)
    one.add_argument("--setup", type=float, required=True)
    for name in ("--prepare", "--usd-per-hour", "--budget-usd", "--budget-hours"):
        one.add_argument(name, type=float)
    one.add_argument("--tail", type=float, default=0.0)
    one.add_argument("--nodes", type=int, default=1)
    verb("pack", pack, "environment", "place", "name")
    verb("send-evaluations", send_evaluations, "url")
    verb("charge", charge, "run", "folder")
    verb("moves", moves, "place", "name").add_argument("--most", type=int, required=True)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError naming what is missing."""
    protocol = args.store.partition("://")[0] if is_url(args.store) else ""
    names = (*NEEDED, *BUCKET.get(protocol, ()))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{sys.executable} has no {', '.join(missing)}: install them there, or leave --python "
            f"out and the environment is made"
        )
    if args.gpus:
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if seen < args.gpus:
            raise UserError(
                f"torch {torch.__version__} in {sys.executable} sees {seen} of {args.gpus} GPUs "
                f"here; it wants another driver, or the driver another torch"
            )


# ---------------------------------------------------------------- the machine and its price


def tell_held(args: argparse.Namespace) -> None:
    """held.json for the trainer, the first deadline for the timer, the price to the shell."""
    usd_per_hour, note = args.usd_per_hour, None
    if usd_per_hour is None:
        usd_per_hour, note = price_here()
    since = args.since
    setup = max(since, args.setup)
    prepare = None if args.prepare is None else max(setup, args.prepare)  # no second twice
    machine = Held(since, setup, usd_per_hour, args.tail, prepare, note)
    held.write(Path(args.folder), machine)
    limits = [args.budget_hours * 3600] if args.budget_hours else []
    if args.budget_usd:
        limits.append(args.budget_usd / (usd_per_hour * args.nodes) * 3600)
    if limits:
        spent_at = since + min(limits)
        held.tell_deadline(Path(args.folder), spent_at=spent_at, tail_seconds=args.tail)
    print(f"{usd_per_hour:.10g}")


def price_here() -> tuple[float, str | None]:
    """Dollars an hour of this machine by the task's table, and what is doubtful about it.

    Raises UserError where there is no table.
    """
    try:
        rows = json.loads(os.environ.get(PRICES, "[]"))
        where = json.loads(os.environ.get(WHERE) or "{}")
    except ValueError as error:
        raise UserError(f"{PRICES} or {WHERE} is not JSON: {error}") from None
    if not rows:
        raise UserError(f"no price of this machine: give --usd-per-hour, or a table in {PRICES}")
    cards = cards_here()
    count = int(os.environ.get(COUNT) or len(cards))
    return choose_price(rows, where, count, cards)


def choose_price(
    rows: list[dict[str, Any]], where: dict[str, Any], count: int, cards: list[str]
) -> tuple[float, str | None]:
    """The row that fits the machine; the dearest of those that might, with a note."""
    fitting = [row for row in rows if _fits(row, where, count, cards)]
    prices = {float(row["usd_per_hour"]) for row in fitting or rows}
    place = f"{where.get('cloud')} {where.get('region')}, {count} GPUs ({', '.join(cards)})"
    if not fitting:
        return max(prices), f"no price is known of {place}: the highest of the table is charged"
    if len(prices) > 1:
        return max(prices), f"{len(prices)} prices fit {place}: the highest is charged"
    return prices.pop(), None


def _fits(row: dict[str, Any], where: dict[str, Any], count: int, cards: list[str]) -> bool:
    """Whether a row may be of this machine; what is not known of the machine excludes nothing."""
    for key in ("cloud", "region"):  # a row without one fits any
        its, mine = row.get(key), where.get(key)
        if its is not None and mine is not None and its.lower() != mine.lower():
            return False
    name, _, number = str(row.get("accelerator") or "").partition(":")
    its_count = int(float(row.get("gpu_count") or number or (1 if name else 0)))
    if its_count != count:
        return False
    return not cards or not name or _means(name, cards[0])


def _means(accelerator: str, card: str) -> bool:
    """Whether SkyPilot's name of an accelerator means the card that nvidia-smi names."""
    from tuppence.plan.gpus import cards_meant, find_gpu

    try:
        usual, here = find_gpu(accelerator), find_gpu(card)
    except UserError:
        return False
    alike = 0.9 < here.memory_gib / usual.memory_gib < 1.1  # A100 is the one of 40 GB there
    return alike and here.name in cards_meant(accelerator)


def cards_here() -> list[str]:
    """What nvidia-smi calls the GPUs here; none where it is missing or has no driver."""
    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


# ---------------------------------------------------------------- ranks


def rank(file: Path, words: list[str]) -> int:
    """The verb as one rank of torchrun, whose own exit code says nothing of its ranks'."""
    from tuppence import cli, host

    try:
        code = cli.main(words)
    except SystemExit as end:  # a rank that followed the lead to its end
        code = int(end.code or 0)
    if code and host.local_rank() == 0:
        file.write_text(f"{code}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads do not always survive an orderly end of the interpreter


# ---------------------------------------------------------------- to the store


def pack(args: argparse.Namespace) -> None:
    """The environment as one tar beside the kit: whole, or not there."""
    source = Path(args.environment)
    aside = source.with_name(f"{args.name}.{os.getpid()}")
    if not is_url(args.place):
        aside = Path(args.place) / f".{args.name}.{os.getpid()}"
    try:
        with tarfile.open(aside, "w") as tar:
            tar.add(source, arcname=".")
        if not is_url(args.place):
            os.replace(aside, Path(args.place) / args.name)
            return
        store = Store(args.place)
        store.send(aside, args.name, store.digest(aside))
    except Away as error:
        raise Fault(f"the environment could not be sent: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


def send_evaluations(args: argparse.Namespace) -> None:
    """Results that `eval` left beside its copy of the run, to the run's own place."""
    from tuppence import bucket

    parent, _, name = args.url.rpartition("/")
    local = bucket.local_root(parent) / "fetched" / name  # where `eval` had brought it
    store = Store(args.url)
    try:
        for path in sorted((local / "evaluations").rglob("*")):
            if path.is_file():
                store.send(path, path.relative_to(local).as_posix(), store.digest(path))
    except Away as error:
        raise Fault(f"evaluations could not be sent: {error}") from error


def moves(args: argparse.Namespace) -> None:
    """Count that a run asks for another machine. Raises DoesNotFit where it did so often enough."""
    path = Path(args.place) / args.name
    store = Store(args.place) if is_url(args.place) else None
    kept = store.read(args.name) if store else path.read_bytes() if path.exists() else None
    count = int(kept or b"0")
    if count >= args.most:
        raise DoesNotFit(f"{count} other machines were asked for after a fault: no more are")
    content = str(count + 1).encode()
    if store:
        store.write(args.name, content)
    else:
        write_whole(path, content)


def charge(args: argparse.Namespace) -> None:
    """Charge the machine until now, and its tail, to a run whose trainer is gone."""
    from tuppence import bucket
    from tuppence.ledger import charge_idle

    parent, _, name = args.run.rpartition("/")
    root = bucket.local_root(parent) if is_url(args.run) else Path(parent)
    folder, machine = RunFolder(root / name), held.read(Path(args.folder) / held.HELD)
    if not folder.exists():
        return
    with RunLock(folder):
        charge_idle(folder, machine, until=time.time() + machine.tail_seconds)
        if is_url(args.run):
            bucket.Mirror(folder, args.run).close(SEND_SECONDS)
        folder.close()


if __name__ == "__main__":
    sys.exit(main())
