"""The verb `prepare`: text to token shards, here or shared by machines, and what is in them."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuppence.config import Data
from tuppence.corpus import options_of, prepared, progress, shards_at
from tuppence.errors import UserError
from tuppence.live import Live
from tuppence.pipeline import asked

if TYPE_CHECKING:
    from tuppence.data.shards import Manifest

Document = dict[str, Any]


def prepare(args: Namespace) -> Document:
    """What was made or found; with `--rank`, this machine's part of it."""
    run = asked(args)
    data = run.data
    if args.merge or (args.rank, args.world) != (None, None):
        _refuse_tokens(data)
    if args.rank is not None or (args.world is not None and not args.merge):
        return _slices(args, data)
    if args.export is not None and args.out is None:
        raise UserError(f"--export {args.export}: say where to, with --out DIR")
    if args.out is not None and args.export is None:
        raise UserError(f"--out {args.out}: say for whom, with --export nanogpt or llmc")
    merge = (args.world or 1) if args.merge else 0
    made, _ = prepared(run, shards_at(args, data), fresh=args.fresh, merge=merge)
    document = {
        "folder": str(made.folder),
        "reused": made.reused,
        "manifest": dataclasses.asdict(made.manifest),
    }
    lines = [] if args.count else told(made.folder, made.manifest, reused=made.reused)
    extra = (_counted, _reported, _exported)
    for act in extra:
        found, text = act(args, data, made.folder, made.manifest)
        document |= found
        lines += text
    if not args.json:
        print("\n".join(lines))
    return document


def _refuse_tokens(data: Data) -> None:
    """Tokens that are there already are nothing to share the making of."""
    from tuppence.data.given import glance

    if glance(data.source or "", data.tokenizer) is not None:
        raise UserError(
            f"data.source={data.source} is tokens already, and read as they are; leave out --rank, "
            "--world and --merge"
        )


def told(folder: Path, manifest: "Manifest", *, reused: bool) -> list[str]:
    """What a person wants to know of what was prepared."""
    from tuppence.data.cache import load_bucket
    from tuppence.store import is_url
    from tuppence.text.sources import left_out

    m, there = manifest, load_bucket(folder)
    where = folder if there is None else there.url
    lines = [
        f"{where}: {'already there' if reused else 'done'}; {m.documents:,} documents, "
        f"{m.tokens:,} tokens ({m.train_tokens:,} train, {m.val_tokens:,} val), "
        f"{m.bytes_per_token:.2f} bytes a token, vocabulary {m.vocab_size:,}"
    ]
    if m.documents > 1 and m.end_of_text is None:
        lines.append("unmarked   the tokenizer has no end-of-text: nothing is between documents")
    if m.max_tokens is not None and m.train_tokens < m.max_tokens:
        lines.append(f"all of it  there is less than data.max_tokens={m.max_tokens:,}")
    if m.documents > 1 and m.lengths:
        named = ", ".join(f"{name} {value:,.0f}" for name, value in m.lengths.items())
        lines.append(f"lengths    {named} tokens")
    if m.languages:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in list(m.languages.items())[:6])
        lines.append(f"languages  {shares} (of a sample)")
    if m.duplicates:
        lines.append(f"left out   {m.duplicates:,} duplicates (data.dedup={m.dedup})")
    lines += [
        f"left out   {count:,} {why.replace('_', ' ')}; the first: {m.bad_named[why]}"
        for why, count in m.bad.items()
    ]
    # of a folder elsewhere only who has just listed it is told; shards can come without their text
    tokens = any(file.path.endswith(".bin") for file in m.inputs)
    known = not reused or not (tokens or is_url(m.source))
    others = left_out(m.source) if known else {}
    if others:
        named = ", ".join(f"{count:,} {suffix}" for suffix, count in others.items())
        lines.append(f"not read   {named}")
    return lines + [f"licence    {m.licence}"] * bool(m.licence)


def _slices(args: Namespace, data: Data) -> Document:
    """This machine's part of a preparation that several share."""
    from tuppence.data.prepare import prepare_slices

    if args.rank is None or args.world is None:
        raise UserError("--rank R and --world N go together: this is machine R (from 0) of N")
    for flag in ("merge", "fresh", "count", "report", "export", "out"):
        if getattr(args, flag):
            raise UserError(
                f"--{flag} beside --rank: a rank makes its slices and nothing else; leave it out "
                "here, or say it when they are merged"
            )
    live = Live()
    made = prepare_slices(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        root=shards_at(args, data),
        options=options_of(data, rank=args.rank, world=args.world),
        on_progress=progress(live),
    )
    live.clear()
    if not args.json:
        print(
            f"{made.folder}: already put together, {made.tokens:,} tokens"
            if made.merged
            else f"{made.folder}: {made.mine} of {made.slices} slices, {made.tokens:,} tokens; "
            f"when all ranks are done: tuppence prepare ... --merge --world {args.world}"
        )
    return (
        {"rank": args.rank, "world": args.world}
        | dataclasses.asdict(made)
        | {"folder": str(made.folder)}
    )


def _counted(
    args: Namespace, data: Data, folder: Path, manifest: "Manifest"
) -> tuple[Document, list[str]]:
    if not args.count:
        return {}, []
    from tuppence.data.count import count

    found = count(folder, manifest)
    lines = [
        f"{split:9} {tokens:>18,} tokens in {found.shards[split]:,} shards"
        for split, tokens in found.tokens.items()
    ]
    documents = "" if found.documents is None else f", {found.documents:,} documents"
    lines.append(f"{'together':9} {sum(found.tokens.values()):>18,} tokens{documents}")
    lines.append(f"{folder}: every shard is as its manifest says ({found.checked})")
    return {"count": dataclasses.asdict(found)}, lines


def _reported(
    args: Namespace, data: Data, folder: Path, manifest: "Manifest"
) -> tuple[Document, list[str]]:
    if not args.report:
        return {}, []
    from tuppence.data.given import glance
    from tuppence.text.reading import sampled
    from tuppence.text.sources import find_files
    from tuppence.tokenizer.compression import SAMPLE_BYTES, beside_published, table
    from tuppence.tokenizer.spec import load_tokenizer

    source = data.source or ""
    if glance(source, data.tokenizer) is not None:
        raise UserError(f"--report: {source} is tokens; compression is told of text")
    texts = sampled(find_files(source), chars=SAMPLE_BYTES, text_field=manifest.text_field)
    rows = beside_published(texts, load_tokenizer(folder / "tokenizer"))
    return {"compression": [dataclasses.asdict(row) for row in rows]}, [table(rows)]


def _exported(
    args: Namespace, data: Data, folder: Path, manifest: "Manifest"
) -> tuple[Document, list[str]]:
    if args.export is None:
        return {}, []
    from tuppence.data.export import export

    made = export(folder, manifest, how=args.export, out=Path(args.out))
    return {"exported": [str(path) for path in made]}, [f"written    {path}" for path in made]
