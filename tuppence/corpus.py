"""The corpus of a run: what a cheap look at it tells, and the shards that it is made into.

surveyed ─▶ a plan's numbers          prepared ─▶ a folder of shards, here or before a bucket
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuppence import bucket
from tuppence.config import Data, DataPlan, Run
from tuppence.errors import UserError
from tuppence.live import Live

if TYPE_CHECKING:
    from tuppence.data.prepare import Options, Place, Prepared, Progress

CACHE_GB = 20.0  # of shards that are on a bucket, where nothing else was asked


def refuse_unprepared(source: str) -> None:
    """A corpus that only plans know is refused before anything is measured."""
    from tuppence.text.corpora import check_preparable

    if not Path(source).exists():
        check_preparable(source)


def surveyed(run: Run) -> DataPlan:
    """The corpus as a cheap look at it tells."""
    from tuppence.data.given import glance
    from tuppence.data.split import Asked
    from tuppence.data.survey import survey

    data = run.data
    if (there := glance(data.source or "", data.tokenizer)) is not None:
        _refuse_changes(data)
        return DataPlan(
            source=data.source or "",
            text_field=data.text_field or "text",
            max_tokens=data.max_tokens,
            val_tokens_asked=data.val_tokens,
            inputs_sha256=None,
            packing=data.packing or "plain",
            **dataclasses.asdict(there),
        )
    seen = survey(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        text_field=data.text_field or "text",
    )
    if data.packing == "documents" and data.tokenizer == "char" and seen.single:
        raise UserError(
            "data.packing=documents: characters of a single text have no end-of-text, so documents "
            "cannot be told apart; use data.packing=plain"
        )
    asked = Asked(data.max_tokens, data.val_tokens, seen.source_bytes, seen.single)
    wanted = asked.wanted_tokens()
    tokens = seen.tokens if wanted is None else min(seen.tokens, wanted)
    split = asked.split(tokens, estimated=not seen.exact)
    return DataPlan(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2",
        text_field=data.text_field or "text",
        max_tokens=data.max_tokens,
        val_tokens_asked=data.val_tokens,
        vocab_size=seen.vocab_size,
        train_tokens=split.train[1] - split.train[0],
        val_tokens=split.val[1] - split.val[0],
        bytes_per_token=seen.bytes / max(1, seen.tokens),
        inputs_sha256=None,
        exact=seen.exact,
        packing=data.packing or "plain",
    )


def options_of(data: Data, *, rank: int = 0, world: int = 1) -> "Options":
    """How the corpus is to be prepared: as asked, else as a corpus of this name is best."""
    from tuppence.data.prepare import Options
    from tuppence.text.corpora import defaults_of

    defaults = defaults_of(data.source or "")
    if data.shuffle:
        defaults.pop("seed", None)
    asked = defaults | {
        key: value
        for key in ("text_field", "max_tokens", "val_tokens", "dedup", "on_bad", "workers", "seed")
        if (value := getattr(data, key)) is not None
    }
    if data.shuffle is False:
        asked["seed"] = None
    return Options(**asked, rank=rank, world=world)


def shards_at(args: Namespace, data: Data) -> "Place":
    """Where shards are or go: a folder, or a bucket and a folder of the user's cache before it."""
    from tuppence.data.prepare import Place

    cache_bytes = round((data.cache_gb or CACHE_GB) * 1e9)
    if bucket.is_url(args.data):
        return Place(bucket.local_root(args.data), args.data, cache_bytes)
    return Place(Path(args.data), None, cache_bytes)


def prepared(
    run: Run,
    place: "Place",
    *,
    fresh: bool = False,
    merge: int = 0,
    known: str | None = None,
    tick: Any = None,
) -> tuple["Prepared", DataPlan]:
    """Shards on disk (made now or found), and the corpus as their manifest tells.

    `known` is the key of shards that a run has begun with: of a source that lies elsewhere they are
    found by it without a network.
    """
    from tuppence.data.prepare import Prepared, prepare
    from tuppence.data.shards import load_manifest

    data = run.data
    there = _tokens_given(data, place) or _found_again(data, place, known)
    if there is not None:
        made = Prepared(there, load_manifest(there), reused=True)
    else:
        live = Live()
        made = prepare(
            source=data.source or "",
            tokenizer=data.tokenizer or "gpt2",
            root=place,
            options=options_of(data),
            fresh=fresh,
            merge=merge,
            on_progress=progress(live, tick),
        )
        live.clear()
    manifest = made.manifest
    return made, DataPlan(
        source=data.source or "",
        tokenizer=data.tokenizer or "gpt2" if there is None else manifest.tokenizer,
        text_field=manifest.text_field,
        max_tokens=manifest.max_tokens,
        val_tokens_asked=data.val_tokens,
        vocab_size=manifest.vocab_size,
        train_tokens=manifest.train_tokens,
        val_tokens=manifest.val_tokens,
        bytes_per_token=manifest.bytes_per_token,
        inputs_sha256=manifest.inputs_sha256,
        exact=True,
        packing=data.packing or "plain",
    )


def progress(live: Live, tick: Any = None) -> Callable[["Progress"], None]:
    """Shows where a preparation stands; `tick` is called as often."""

    def show(p: "Progress") -> None:
        share = f" {p.done_bytes / p.total_bytes:4.0%}" if p.done_bytes and p.total_bytes else ""
        rate = f"  {p.tokens / p.seconds:,.0f} tok/s" if p.tokens and p.seconds > 0.5 else ""
        live.show(f"preparing: {p.phase}{share}  {p.tokens:,} tokens{rate}")
        if tick:
            tick()

    return show


def _tokens_given(data: Data, place: "Place") -> Path | None:
    """The folder of a source that is tokens already, which are taken as they are."""
    from tuppence.data.given import given

    source = data.source or ""
    place.root.mkdir(parents=True, exist_ok=True)
    folder = given(source, data.tokenizer, place.root, cache_bytes=place.cache_bytes)
    if folder is not None:
        _refuse_changes(data)
    return folder


def _found_again(data: Data, place: "Place", key: str | None) -> Path | None:
    """The shards of this key, where the text is elsewhere and they are here."""
    from tuppence.data.shards import MANIFEST, load_manifest
    from tuppence.text.corpora import CORPORA

    source = data.source or ""
    if key is None or not (bucket.is_url(source) or source in CORPORA):
        return None
    for folder in place.root.glob(f"*-{key[:12]}"):
        if (folder / MANIFEST).exists() and load_manifest(folder).inputs_sha256 == key:
            return folder
    return None


def _refuse_changes(data: Data) -> None:
    """Tokens that are there already are taken as they are."""
    for key in ("max_tokens", "val_tokens", "dedup", "seed", "shuffle"):
        value = getattr(data, key)
        if value is not None:
            raise UserError(
                f"data.{key}={value}: {data.source} is tokens already, and read as they are; "
                f"data.{key}=none leaves it out"
            )
