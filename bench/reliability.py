"""`kill -9` at random moments of many runs: are they the same runs? For docs/RELIABILITY.md.

    python bench/reliability.py [--kills 100] [--seed 0] [--ranks 1 2] [--bucket none file s3]
                                [--families gpt2 depth looped] [--out reliability.jsonl]
    python bench/reliability.py --goodput [--kill-every 300] [--steps 1200]

Each run is killed a few times, mostly all of its processes at once, with many ranks sometimes one
alone; on a bucket sometimes the folder goes too, as with a machine that vanished. Then it is left
to end, and every loss, gradient norm, token hash and evaluation and the final weights' hash are
compared with the uninterrupted run's. Every run is a line of --out: the same command goes on where
it was stopped. Exit 1 on any difference.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from common import machine
from sites import FAMILIES, Config, Site, Tree, kill

from tuppence import bucket
from tuppence.drill.processes import last_step
from tuppence.drill.scene import Evidence, difference, evidence
from tuppence.ledger import by_phase

PER_RUN = 5  # kills
AT_START, AT_PREPARE = 0.1, 0.2  # shares of kills: below the first, then below the second
START_SECONDS = 4.0
ONE_RANK = 0.3  # share of kills, with many ranks
FOLDER_GOES = 0.5  # share of kills, on a bucket


@dataclass(frozen=True)
class Kill:
    """What a kill hit: the phase that was charged for, the last step that was logged, whether a
    save or an upload was under way beside it; who was killed, and whether the folder went too."""

    phase: str
    step: int
    saving: bool
    uploading: bool
    whom: str
    folder_gone: bool


# ---------------------------------------------------------------- kills


def broken(site: Site, chance: random.Random, kills: int, span: float) -> list[Kill]:
    """Start, kill, start, ... `kills` times, or until it ends; then let it end."""
    done: list[Kill] = []
    dead: set[int] = set()
    while len(done) < kills:
        with site.start() as started:
            _await_moment(site, started, chance, dead, span)
            if not started.alive():
                break  # it ended: fewer kills
            done.append(_killed(site, started, chance, dead))
    site.finish()
    return done


def _await_moment(
    site: Site, started: Tree, chance: random.Random, dead: set[int], span: float
) -> None:
    """A random moment: of the start, of preparing, or (mostly) of all that follows."""
    draw = chance.random()
    if draw < AT_START:
        time.sleep(chance.uniform(0, START_SECONDS))
        return
    before = ("", "provision") if draw < AT_PREPARE else ("", "provision", "prepare")
    while started.alive() and phase_of(site, dead) in before:
        time.sleep(0.005)
    end = time.monotonic() + chance.uniform(0, 0.5 if draw < AT_PREPARE else span)
    while started.alive() and time.monotonic() < end:
        time.sleep(0.002)


def _killed(site: Site, started: Tree, chance: random.Random, dead: set[int]) -> Kill:
    phase = phase_of(site, dead) or "start"
    ranks = started.ranks()
    alone = len(ranks) == site.config.ranks > 1 and chance.random() < ONE_RANK
    whom = chance.randrange(len(ranks)) if alone else None
    if whom is None:
        started.kill()
    else:
        kill(ranks[whom])
        started.wait()  # torchrun ends the others
        started.kill()
    dead.add(_beat(site).get("pid", 0))
    hit = Kill(
        phase,
        last_step(site.folder.path) or 0,
        any(site.folder.checkpoints.glob(".step_*")),
        site.uploading(),
        "all" if whom is None else f"rank {whom}",
        bucket.is_url(site.runs) and chance.random() < FOLDER_GOES,
    )
    if hit.folder_gone:
        shutil.rmtree(site.folder.path, ignore_errors=True)
    return hit


def _beat(site: Site) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((site.folder.path / "heartbeat.json").read_text())
    return {}


def phase_of(site: Site, dead: set[int]) -> str:
    """What the attempt that lives is charging for; empty before it charges anything."""
    said = _beat(site)
    return "" if said.get("pid", 0) in {0, *dead} else str(said["phase"])


# ---------------------------------------------------------------- the whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--bucket", nargs="+", choices=["none", "file", "s3"], default=["none"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("reliability.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what --out holds, run nothing")
    parser.add_argument("--goodput", action="store_true", help="what a kill costs, in its place")
    parser.add_argument("--kill-every", type=int, default=300, help="steps, for --goodput")
    args = parser.parse_args()
    configs = [
        Config(family, ranks, where)
        for family in args.families
        for ranks in args.ranks
        for where in args.bucket
    ]
    with tempfile.TemporaryDirectory(prefix="reliability-") as place, _s3("s3" in args.bucket):
        os.environ["XDG_CACHE_HOME"] = f"{place}/cache"
        if args.goodput:
            goodput(Path(place), args.steps, args.kill_every)
            return
        if not args.table:
            for config, kills in _shares(configs, args.kills, _lines(args.out)):
                share(Path(place), config, kills, args)
    sys.exit(table(_lines(args.out)))


def _shares(
    configs: list[Config], kills: int, done: list[dict[str, Any]]
) -> Iterator[tuple[Config, int]]:
    """Each kind of run and the kills that it still is to take."""
    for number, config in enumerate(configs):
        wanted = kills // len(configs) + (number < kills % len(configs))
        taken = sum(len(row["kills"]) for row in done if row["config"] == asdict(config))
        if wanted > taken:
            yield config, wanted - taken


def share(place: Path, config: Config, kills: int, args: argparse.Namespace) -> None:
    """The uninterrupted run, then broken ones until so many kills are done."""
    straight = Site(place / "straight", Config(config.family, config.ranks, "none"), args.steps)
    straight.clear()
    straight.finish()
    whole = evidence(straight.folder)
    span = 1.3 * _after_start(straight) / min(PER_RUN, kills)
    while kills > 0:
        run = sum(row["config"] == asdict(config) for row in _lines(args.out))
        chance = random.Random(f"{args.seed} {config} {run}")
        site = Site(place / f"run-{config.family}-{config.ranks}-{run}", config, args.steps)
        site.clear()
        done = broken(site, chance, min(PER_RUN, kills), span)
        _keep(args.out, config, done, _odd(whole, site))
        site.clear()
        kills -= len(done)


def _after_start(site: Site) -> float:
    """Seconds of a run after what precedes its first step."""
    phases = by_phase(site.folder)
    return sum(
        part.seconds for name, part in phases.items() if name not in ("provision", "prepare")
    )


def _odd(whole: Evidence, site: Site) -> str:
    return difference(whole, evidence(site.folder), exact=True)


def _keep(out: Path, config: Config, kills: list[Kill], odd: str) -> None:
    row = {"config": asdict(config), "kills": [asdict(kill) for kill in kills], "odd": odd}
    with out.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    where = ", ".join(f"{kill.phase} at {kill.step}" for kill in kills)
    print(f"{config}: {len(kills)} kills ({where}): {odd or 'the same run'}", flush=True)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


@contextlib.contextmanager
def _s3(wanted: bool) -> Iterator[None]:
    """A server that speaks S3, on loopback."""
    if not wanted:
        yield
        return
    import logging

    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # or it prints each request
    server.start()
    address, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{address}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        fsspec.filesystem("s3").mkdir("reliability")
        yield
    finally:
        server.stop()


# ---------------------------------------------------------------- what is printed


def table(rows: list[dict[str, Any]]) -> int:
    """The table, and the exit code."""
    print(
        "| family | ranks | bucket | runs | kills | while | alone | folder gone | bitwise equal |"
    )
    print("|---|---:|---|---:|---:|---|---:|---:|---:|")
    kinds = {json.dumps(row["config"]): Config(**row["config"]) for row in rows}
    for config in kinds.values():
        mine = [row for row in rows if row["config"] == asdict(config)]
        print(_table_row(config, mine))
    kills = [kill for row in rows for kill in row["kills"]]
    good = sum(len(row["kills"]) for row in rows if not row["odd"])
    print(
        f"\n{good} of {len(kills)} `kill -9` ({_while(kills)}) in {len(rows)} runs: later losses,"
    )
    print("gradient norms, token hashes, evaluations and final weights bitwise equal to the")
    print(f"uninterrupted run. {date.today()}, {machine()}.")
    for row in rows:
        if row["odd"]:
            print(f"DIFFERENT: {row}")
    return 0 if good == len(kills) else 1


def _table_row(config: Config, rows: list[dict[str, Any]]) -> str:
    kills = [kill for row in rows for kill in row["kills"]]
    alone = sum(kill["whom"] != "all" for kill in kills)
    gone = sum(kill["folder_gone"] for kill in kills)
    equal = sum(not row["odd"] for row in rows)
    return (
        f"| {config.family} | {config.ranks} | {config.bucket} | {len(rows)} | {len(kills)} | "
        f"{_while(kills)} | {alone} | {gone} | {equal} of {len(rows)} |"
    )


def _while(kills: list[dict[str, Any]]) -> str:
    phases = Counter(kill["phase"] for kill in kills)
    parts = [f"{count} {phase}" for phase, count in phases.most_common()]
    for key in ("saving", "uploading"):
        if count := sum(kill[key] for kill in kills):
            parts.append(f"{count} {key} beside it")
    return ", ".join(parts)


def goodput(place: Path, steps: int, every: int) -> None:
    """One run, killed every so many steps; where its seconds and dollars went, as its receipt has
    it."""
    site = Site(place / "goodput", Config("depth", 1, "none"), steps)
    site.clear()
    kills = 0
    for at in range(every, steps, every):
        with site.start() as started:
            while started.alive() and (last_step(site.folder.path) or 0) < at:
                time.sleep(0.002)
            kills += started.alive()
    site.finish()
    phases = by_phase(site.folder)
    total = sum(part.seconds for part in phases.values())
    print(f"{steps} steps, {kills} kills, one every {every} steps; {date.today()}, {machine()}\n")
    print("| phase | seconds | share | usd |\n|---|---:|---:|---:|")
    for name, part in sorted(phases.items(), key=lambda item: -item[1].seconds):
        print(f"| {name} | {part.seconds:.1f} | {part.seconds / total:.1%} | {part.usd:.5f} |")
    print(f"| all | {total:.1f} | | {sum(part.usd for part in phases.values()):.5f} |")
    attempts = kills + 1
    start = sum(phases[name].seconds for name in ("provision", "prepare")) / attempts
    lost = phases["lost"].seconds / max(1, kills) if "lost" in phases else 0.0
    close, usual = 1 - (start + lost) / 300, 1 - (start + 30) / 300
    print(f"\nA kill costs {start:.1f} s of start-up here and {lost:.1f} s of work to do again.")
    print(f"At one in five minutes that is {close:.1%} goodput, with saves as close as these;")
    print(f"with one a minute half of it is done again: {usual:.1%} (arithmetic).")


if __name__ == "__main__":
    main()
