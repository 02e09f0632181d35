"""Words of the verbs that rent machines: launch, status, logs, stop, fetch, guard.

Only argparse: `tuppence --help` reads this, so nothing here imports what those verbs need.
"""

import argparse
from typing import Any

PRICE_RISE = 0.1  # that a launch takes without asking again: docs/launch.md
LAUNCH_EXAMPLES = """example: tuppence launch llmc_gpt2_124m machine.spot=on --store s3://my-bucket/tuppence
         tuppence launch quickstart budget.usd=1 machine.gpu=T4 --dry-run
         tuppence launch shakespeare --ssh gpubox
docs: docs/launch.md; machines of your own: docs/ssh.md"""
ABOUT = {
    "launch": "the main job on rented machines, at the planned price, stopped when it is spent",
    "status": "what runs on rented machines, what it has cost so far and will cost",
    "logs": "what the machines of a launch say",
    "stop": "end a launch and every machine that it started; also one that was half started",
    "fetch": "bring a run's folder back from the store: documents and the best weights",
    "guard": "look after launches: stop what has spent its money, take down what was left",
}
EXAMPLES = {
    "status": "shakespeare",
    "logs": "shakespeare --follow",
    "stop": "shakespeare --bucket",
    "fetch": "shakespeare --checkpoint best",
    "guard": "shakespeare",
}


def add_verbs(verbs: Any, common: Any) -> None:
    """All six; `common` adds --json, --runs and --data."""
    launch = verbs.add_parser(
        "launch",
        help=ABOUT["launch"],
        description=ABOUT["launch"],
        epilog=LAUNCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    launch.add_argument(
        "words",
        nargs="*",
        metavar="[RECIPE] key=value",
        help="a recipe's name or file.py:function (default shakespeare), then overrides",
    )
    common(launch)
    launch.set_defaults(fresh=False)  # the same words go on, here as there
    _what(launch)
    _how(launch)
    _where(launch)
    for verb, example in EXAMPLES.items():
        sub = verbs.add_parser(
            verb,
            help=ABOUT[verb],
            description=ABOUT[verb],
            epilog=f"example: tuppence {verb} {example}",
        )
        few = "?" if verb in ("status", "guard") else None  # without one: all of them
        sub.add_argument("run", metavar="RUN", nargs=few, help="the name of a launch in --runs")
        common(sub)
        _sky(sub)
        _OF[verb](sub)


# ---------------------------------------------------------------- launch


def _what(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--store", metavar="URL|FOLDER", help="where code, data and runs go: s3://, gs:// or a disk"
    )
    sub.add_argument(
        "--stages", metavar="A,B", help="of prepare,train,eval (prepare,train; eval with --tasks)"
    )
    sub.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        help="prepare on a machine of its own, or not (whichever costs less)",
    )
    sub.add_argument("--tasks", metavar="A,B", help="what eval asks (tuppence eval --help)")
    sub.add_argument("--prices", metavar="FILE", help="your own prices (docs/prices.md)")
    sub.add_argument("--strict", action="store_true", help="refuse where the plan only warns")


def _how(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--yes", action="store_true", help="do not ask before money is spent")
    sub.add_argument("--detach", action="store_true", help="start it, and do not follow")
    sub.add_argument("--dry-run", action="store_true", help="show all, make nothing, ask no cloud")
    sub.add_argument(
        "--to-yaml", metavar="DIR", help="write the tasks for `sky jobs launch`; start nothing"
    )
    sub.add_argument(
        "--max-price-rise",
        type=float,
        default=PRICE_RISE,
        metavar="SHARE",
        help="what today's price may be above the planned one (0.1)",
    )


def _where(sub: argparse.ArgumentParser) -> None:
    _sky(sub)
    sub.add_argument("--ssh", metavar="HOST", help="a machine that you have, by ssh; rents nothing")
    sub.add_argument("--folder", metavar="DIR", help="where on that machine (~/tuppence/NAME)")
    sub.add_argument("--ssh-config", metavar="FILE", help="ssh's -F: a config file of your own")
    sub.add_argument(
        "--python", metavar="PATH", help="on the machines: it has all that is needed; no install"
    )
    sub.add_argument("--image", metavar="IMG", help="machines start from it, such as docker:IMAGE")
    sub.add_argument(
        "--infra", metavar="CLOUD[/REGION]", help="only there; in SkyPilot's own words"
    )


# ---------------------------------------------------------------- the others


def _sky(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--sky", metavar="PYTHON", help="a Python that has SkyPilot (else one is made once)"
    )


def _status(sub: argparse.ArgumentParser) -> None:
    pass


def _logs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--follow", "-f", action="store_true", help="go on as they come")
    sub.add_argument("--stage", metavar="S", help="prepare, train or eval (the one that runs)")
    sub.add_argument("--tail", type=int, metavar="N", help="the last N lines")


def _stop(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--yes", action="store_true", help="do not ask")
    sub.add_argument(
        "--bucket", action="store_true", help="delete what the launch made on the store, too"
    )
    sub.add_argument("--shards", action="store_true", help="with --bucket: the store's data/ too")
    sub.add_argument("--clean", action="store_true", help="of --ssh: delete the folder there, too")


def _fetch(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="best (default; weights only), last, all, none or a step",
    )
    sub.add_argument("--out", metavar="DIR", help="the folder to write (RUNS/NAME)")


def _guard(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--every", type=float, metavar="SECONDS", help="between looks (30)")
    sub.add_argument("--once", action="store_true", help="one look, and no more")


_OF = {"status": _status, "logs": _logs, "stop": _stop, "fetch": _fetch, "guard": _guard}
