"""The verb `fetch`: a run's folder back from its store, as a run folder that every verb takes."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tuppence import report
from tuppence.cloud import bringing, record, store_made
from tuppence.cloud.record import Record
from tuppence.errors import Fault, UserError
from tuppence.folder import RunFolder
from tuppence.pipeline import say
from tuppence.store import Away, is_url

Document = dict[str, Any]


def fetch(args: Namespace) -> Document:
    """By the name of a launch, or by the run's place: a URL or a folder."""
    if is_url(args.runs):
        raise UserError(f"--runs {args.runs}: the folder here that the run is brought to")
    where, name = args.run.rstrip("/"), args.run.rstrip("/").rpartition("/")[2]
    launched = None if is_url(where) else record.read(Path(args.runs) / where)
    if launched is None and not is_url(where) and (Path(where) / record.FILE).exists():
        launched = record.read(Path(where))
    folder = Path(args.out) if args.out else Path(args.runs) / (launched.name if launched else name)
    if launched is not None:
        return bring(launched, folder, checkpoint=args.checkpoint, args=args)
    if not is_url(where) and not Path(where).is_dir():
        record.find(args.run, Path(args.runs))  # says what there is
    return _brought(where, folder, args.checkpoint, args)


def bring(launched: Record, folder: Path, *, checkpoint: str, args: Namespace) -> Document:
    """The run of a launch."""
    if launched.kind == "ssh" and not is_url(launched.launch.store):
        return _by_ssh(launched, folder, checkpoint, args)
    return _brought(launched.run_url, folder, checkpoint, args)


def _brought(url: str, folder: Path, checkpoint: str, args: Namespace) -> Document:
    if not is_url(url) and folder.resolve() == Path(url).resolve():
        raise UserError(f"{url} is that run itself; name --out DIR to copy it")
    try:
        there = bringing.found(url)
        came = bringing.bring(there, folder, which=checkpoint, say=say)
    except Away as error:
        raise UserError(f"{error}; check the network, then run the same command") from error
    usd = store_made.egress_usd(came.bytes, url)
    say(f"fetched   {bringing.words(came, folder, usd)}")
    receipt = _receipt(RunFolder(folder), args)
    return {
        "run": str(folder),
        "url": url,
        "files": came.files,
        "bytes": came.bytes,
        "already_here": came.same,
        "checkpoints": came.checkpoints,
        "egress_usd": usd,
        "receipt": receipt,
    }


def _by_ssh(launched: Record, folder: Path, checkpoint: str, args: Namespace) -> Document:
    """From a machine that a person has; ssh.py compares what comes."""
    from tuppence.cloud.ssh_after import ssh_fetch

    told = ssh_fetch(launched, folder, checkpoint=checkpoint)
    return {"run": str(folder), **told, "receipt": _receipt(RunFolder(folder), args)}


def _receipt(folder: RunFolder, args: Namespace) -> Document | None:
    """Rendered anew from what came, and shown; None where the run was not planned yet."""
    if not folder.exists() or not folder.file("plan.json").exists():
        say("receipt   there is none yet: the run has not been planned")
        return None
    try:
        told, why = report.kept(folder)
    except Fault as error:
        say(f"receipt   {error}")
        return None
    if why:
        say(f"receipt   {folder.file('receipt.html')} and the files beside it are as there: {why}")
    if not args.json:
        print(report.as_text(told))
        print(f"more      {folder.file('receipt.html')}; tuppence sample {folder.path.name}")
    return json.loads(json.dumps(told))  # type: ignore[no-any-return]
