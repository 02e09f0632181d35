"""The command line: reads the words, calls the verb, turns errors into one line and an exit code.

    0 done    1 a fault    2 the input was wrong    3 does not fit the budget or the machine
    4 another attempt has taken the run    128 + n   stopped by signal n, after saving

Nothing here imports torch; verbs.py does, in the verbs that need it.
"""

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from tuppence import __version__, host, rented_options
from tuppence.errors import DoesNotFit, Fault, UserError

PLAN_EXAMPLES = """example: tuppence plan budget.usd=100 data.source=fineweb_edu
         tuppence plan gpt2_124m data.source='texts/*.jsonl' budget.hours=12
         tuppence plan llmc_gpt2_124m machine.gpu=4090 machine.usd_per_hour=0.35
         tuppence plan nanogpt_4b_tokens --as-published
keys: docs/recipes.md; columns and warnings: docs/plan.md"""
RECIPE_VERBS = {
    "run": ("plan, prepare, train, evaluate, sample, receipt: the main job", "budget.usd=0.05"),
    "plan": ("what it will cost, take, need and reach, before anything is spent", "budget.hours=2"),
    "prepare": ("text to token shards", "data.source='books/*.jsonl.xz' data.tokenizer=gpt2"),
    "train": ("training alone; resumes by itself", "budget.steps=500"),
}
RUN_VERBS = {
    "eval": (
        "bits per byte, CORE, HellaSwag, samples or lm-evaluation-harness's tasks, of a run or of "
        "a model of transformers",
        "--tasks bpb,sample",
    ),
    "sample": ("let the trained model continue a prompt", '"ROMEO:" --tokens 300'),
    "watch": (
        "a live view of a run, here or on a bucket: loss, dollars, time left, what happened",
        "",
    ),
    "receipt": ("what was promised against what was paid", ""),
    "export": ("the trained model as a folder that transformers loads", "--to hf"),
    "drill": ("kill, tear, fill and poison a copy of the run: what survives?", ""),
}
PLAIN_VERBS = {
    "compare": "runs side by side: losses and receipts, by tokens, hours and dollars",
    "import": "weights of others, to start a run from with train.init_from",
    "recipes": "the recipes there are, with what each one asks",
    "runs": "the runs in a folder or on a bucket: running, finished, dead, and what each cost",
    "calibrate": "measure this machine: matmul ceiling, bandwidth, disk",
    "prices": "the price book: machines, prices, dates, and what is doubtful about them",
}
PLAIN_EXAMPLES = {"compare": "small wide", "import": "openai-community/gpt2"}


CANNOT_WRITE = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT)
NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # letters that a terminal has not
    try:
        args = _parse(words)
        from tuppence import verbs

        document = verbs.VERBS[args.verb](args)
        if args.json:
            print(json.dumps(document, indent=2, allow_nan=False), flush=True)
        return 0 if document.get("survived", True) else Fault.exit_code  # a drill's verdict
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it on the way out)
        return 0
    except (UserError, DoesNotFit, Fault) as error:
        return _fail(words, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(words, "interrupted", 130)
    except OSError as error:
        if error.errno in NOT_A_FOLDER:
            message = f"{error.filename}: {error.strerror}; --runs and --data name folders"
            return _fail(words, message, UserError.exit_code)
        if error.errno not in CANNOT_WRITE:
            raise
        return _fail(words, _disk_message(error), Fault.exit_code)
    except Exception as error:
        if not hasattr(error, "exit_code"):  # train's Interrupted, which needs torch to import
            raise
        return _fail(words, str(error), error.exit_code)


def _parse(words: list[str]) -> argparse.Namespace:
    """The command line's parts; key=value may stand before or after the options."""
    args, rest = _parser().parse_known_args(words)
    if hasattr(args, "words"):
        args.words += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if args.verb == "sample" and len(rest) == 1 and not rest[0].startswith("-"):
        args.prompt = rest.pop()  # behind the options
    if rest:
        raise UserError(f"{rest[0]}: no such option; see tuppence {args.verb} --help")
    args.argv = words
    return args


def _disk_message(error: OSError) -> str:
    where = f" {error.filename}" if error.filename else ""
    return (
        f"cannot write{where}: {error.strerror}; make room or give write access, then the same "
        f"command goes on where it was"
    )


def _fail(words: list[str], message: str, code: int) -> int:
    """One line on stderr; with --json the same as the one document on stdout.

    Of many ranks the lead says what is wrong with the input; of faults each says its own.
    """
    if not host.rank():
        sys.stderr.write(f"tuppence: {message}\n")
    elif code == Fault.exit_code:
        sys.stderr.write(f"tuppence: rank {host.rank()}: {message}\n")
    if "--json" in words and not host.rank():
        print(json.dumps({"error": {"exit_code": code, "message": message}}))
    return code


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors: one line, with the near word where there is one."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tuppence",
        description="Train GPTs to a budget: say what you will spend, get the model and a receipt.",
        epilog="example: tuppence run shakespeare budget.usd=0.02",
    )
    parser.add_argument("--version", action="version", version=f"tuppence {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)
    for verb, (text, example) in RECIPE_VERBS.items():
        _recipe_verb(verbs, verb, text, example)
    for verb, (text, example) in RUN_VERBS.items():
        _run_verb(verbs, verb, text, example)
    rented_options.add_verbs(verbs, _common)
    for verb, text in PLAIN_VERBS.items():
        words = f"{verb} {PLAIN_EXAMPLES.get(verb, '')}".rstrip()
        sub = verbs.add_parser(
            verb, help=text, description=text, epilog=f"example: tuppence {words}"
        )
        _common(sub)
        if verb == "compare":
            _compare_options(sub)
        if verb == "import":
            _import_options(sub)
        if verb == "prices":
            sub.add_argument("--prices", metavar="FILE", help="your own prices (docs/prices.md)")
            sub.add_argument(
                "--refresh", action="store_true", help="take them from SkyPilot's catalog first"
            )
        if verb == "calibrate":
            sub.add_argument("--threads", type=int, help="CPU threads to measure with")
            sub.add_argument("--device", choices=["cpu", "cuda"], help="what to measure")
    return parser


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sub.add_argument("--runs", default="runs", metavar="DIR", help="where run folders are (runs)")
    sub.add_argument("--data", default="data", metavar="DIR", help="where shards are (data)")


def _recipe_verb(verbs: Any, verb: str, text: str, example: str) -> None:
    sub = verbs.add_parser(
        verb,
        help=text,
        description=text,
        epilog=PLAN_EXAMPLES
        if verb == "plan"
        else f"example: tuppence {verb} shakespeare {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument(
        "words",
        nargs="*",
        metavar="[RECIPE] key=value",
        help="a recipe's name or file.py:function (default shakespeare), then overrides",
    )
    _common(sub)
    if verb != "plan":
        sub.add_argument(
            "--fresh",
            action="store_true",
            help="made anew" if verb == "prepare" else "start over; what is there is kept aside",
        )
    if verb == "plan":
        sub.add_argument("--all", action="store_true", help="every machine, not the cheapest few")
        sub.add_argument("--plot", metavar="FILE", help="dollars against predicted loss, as SVG")
        sub.add_argument("--prices", metavar="FILE", help="your own prices (docs/prices.md)")
        sub.add_argument(
            "--as-published",
            action="store_true",
            help="a published guide's own figures, beside what arithmetic says",
        )
    if verb == "prepare":
        _prepare_options(sub)
    if verb in ("run", "plan", "train"):
        sub.add_argument("--strict", action="store_true", help="refuse where the plan only warns")
    if verb in ("run", "train"):  # what a rented machine tells: since when it is paid for
        sub.add_argument("--held", metavar="FILE", help=argparse.SUPPRESS)


def _run_verb(verbs: Any, verb: str, text: str, example: str) -> None:
    sub = verbs.add_parser(
        verb, help=text, description=text, epilog=f"example: tuppence {verb} shakespeare {example}"
    )
    few = "?" if verb == "eval" else None  # with --hf there is none
    sub.add_argument("run", metavar="RUN", nargs=few, help="a run's name, or its folder's path")
    _common(sub)
    if verb == "receipt":
        return
    if verb == "watch":
        _watch_options(sub)
        return
    if verb == "drill":
        sub.add_argument(
            "--steps", type=int, help="of each copy (some 30, fewer where one is slow)"
        )
        sub.add_argument("--ranks", type=int, help="processes of each copy (as the run had)")
        sub.add_argument("--kills", type=int, default=3, help="kill -9 at random moments (3)")
        sub.add_argument("--seed", type=int, default=0, help="of the moments (0)")
        sub.add_argument("--keep", action="store_true", help="leave the copies to be looked at")
        return
    sub.add_argument("--checkpoint", default="best", help="best (default), last or a step")
    if verb in ("eval", "sample"):
        _loop_options(sub)
    if verb == "export":
        sub.add_argument("--to", default="hf", choices=["hf"], help="hf, the one there is")
        sub.add_argument("--out", metavar="DIR", help="the folder to write (RUN/export/hf)")
        return
    if verb == "eval":
        _eval_options(sub)
        return
    sub.add_argument("prompt", nargs="?", default="\n", help="text to continue")
    sub.add_argument("--tokens", type=int, default=300, help="how many to generate (300)")
    sub.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (0.8)")
    sub.add_argument("--top-k", type=int, default=200, help="draw from this many tokens (200)")
    sub.add_argument("--seed", type=int, default=1337, help="the same seed, the same text (1337)")


def _compare_options(sub: argparse.ArgumentParser) -> None:
    """Which runs, and where the page goes."""
    sub.add_argument("names", metavar="RUN", nargs="+", help="two to eight: names, paths or URLs")
    sub.add_argument("--out", metavar="FILE", help="the page (compare.html beside the first run)")


def _watch_options(sub: argparse.ArgumentParser) -> None:
    """How often, and how."""
    sub.add_argument(
        "--every", type=float, metavar="SECONDS", help="between looks (2; of a bucket 30)"
    )
    sub.add_argument("--once", action="store_true", help="one screen, and no more")


def _prepare_options(sub: argparse.ArgumentParser) -> None:
    """A preparation shared by machines, and what else can be done with shards."""
    many = sub.add_argument_group("one preparation on many machines (docs/data.md)")
    many.add_argument("--rank", type=int, metavar="R", help="make this machine's slices only")
    many.add_argument("--world", type=int, metavar="N", help="how many machines there are")
    many.add_argument("--merge", action="store_true", help="put the slices of all together")
    sub.add_argument("--count", action="store_true", help="verify the shards, and count them")
    sub.add_argument(
        "--report", action="store_true", help="how well the tokenizer compresses, beside others"
    )
    sub.add_argument("--export", choices=["nanogpt", "llmc"], help="write the tokens for others")
    sub.add_argument("--out", metavar="DIR", help="the folder that --export writes")


def _eval_options(sub: argparse.ArgumentParser) -> None:
    """What is asked, of whom, and how."""
    sub.add_argument(
        "--tasks",
        metavar="A,B",
        help="bpb (default), core, hellaswag, sample, all of these, or lm_eval:TASK",
    )
    sub.add_argument(
        "--max-per-task", "--limit", type=int, metavar="N", help="so many items of each task"
    )
    sub.add_argument("--hf", metavar="DIR|HUB_ID|GGUF", help="a model of transformers, not a RUN")
    sub.add_argument("--val", metavar="RUN|DIR", help="bits per byte on this one's val split")
    sub.add_argument("--against", metavar="RUN|RESULT", help="and how it differs from this one")
    sub.add_argument("--core-data", metavar="PATH", help="CORE's bundle (else it is downloaded)")
    sub.add_argument("--hellaswag-data", metavar="PATH", help="its .jsonl (else downloaded)")
    sub.add_argument("--lm-eval-include", metavar="DIR", help="tasks of your own for the harness")
    sub.add_argument("--batch", type=int, metavar="N", help="texts in a pass at most")
    sub.add_argument(
        "--precision", choices=["fp32", "bf16"], help="fp32; bpb of a run in the run's own"
    )
    sub.add_argument("--out", metavar="DIR", help="where results go (RUN/evaluations/CHECKPOINT)")


def _loop_options(sub: argparse.ArgumentParser) -> None:
    """How long a looped model thinks."""
    loops = sub.add_argument_group("a looped model's iterations")
    loops.add_argument("--recurrence", type=int, metavar="R", help="so many (its mean_recurrence)")
    loops.add_argument(
        "--exit-kl",
        type=float,
        metavar="NATS",
        help="stop a token when successive outputs differ by less (5e-4 is usual)",
    )
    loops.add_argument(
        "--exit-whole", action="store_true", help="stop all tokens at once, when their mean does"
    )


def _import_options(sub: argparse.ArgumentParser) -> None:
    """What to read, and what to call it."""
    sub.add_argument(
        "source",
        metavar="DIR|HUB_ID|FILE",
        help="a folder of transformers, a model's name on the Hub, or nanoGPT's ckpt.pt",
    )
    sub.add_argument("--name", help="what to call it (as the source)")
    sub.add_argument("--out", default="imports", metavar="DIR", help="where it goes (imports)")
