"""Windows to tokens, in worker processes, handed back in order.

    items ──look inside──▶ documents ──shuffle──▶ ids, end-of-text behind each

What a window becomes depends on the window and the job alone, so the number of workers changes
nothing but the time. A few windows are in flight, so memory does not grow with the corpus.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuppence.data import traits
from tuppence.data.permute import key_of, permuted
from tuppence.errors import Fault, UserError
from tuppence.text.documents import Bad, Document, documents_of
from tuppence.text.formats import MOST_WHOLE
from tuppence.text.inputs import InputFile
from tuppence.text.windows import Window
from tuppence.tokenizer.kinds import UnknownCharacter, unknown_character
from tuppence.tokenizer.pieces import Piece, UnbrokenText, batches, recut, unbroken_text
from tuppence.tokenizer.spec import Tokenizer

SPREAD_BYTES = 1 << 21  # of input: less than this is done before workers have started


@dataclass(frozen=True)
class Job:
    """What every worker knows. `seed` None keeps documents in the order they came in."""

    files: Sequence[InputFile]
    text_field: str
    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    seed: int | None
    dedup: str
    languages: bool


@dataclass(frozen=True)
class Encoded:
    """One window as ids, end-of-text included; `starts` says at which of them documents begin.

    `keys` [len(starts), bands] is equal in a band where documents are duplicates (see `dedup`);
    `languages` counts a sample of the documents; `goes_on` says whether the last of them has more
    in the next window.
    """

    slice: int
    number: int
    ids: npt.NDArray[Any]
    starts: npt.NDArray[np.int64]
    text_bytes: int
    bad: list[Bad]
    keys: npt.NDArray[np.uint64]
    languages: Counter[str]
    goes_on: bool = False


def encode_all(
    windows: Iterator[Window], job: Job, *, workers: int
) -> Generator[Encoded, None, None]:
    """The windows encoded, in order; by this process where there is little to do. Raises UserError
    where a long text cannot be encoded, Fault where a worker died."""
    if workers == 1 or sum(file.bytes for file in job.files) < SPREAD_BYTES:
        for window in windows:
            yield encode_window(window, job)
        return
    flying: deque[Future[Encoded]] = deque()
    context = multiprocessing.get_context("spawn")  # a fork copies threads' locks, and is Unix's
    pool = ProcessPoolExecutor(workers, context, _begin, (job,))
    try:
        for _ in range(workers):
            pool.submit(_ready)  # they start while the first window is read
        for window in windows:
            flying.append(pool.submit(_encode, window))
            if len(flying) > workers + 1:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    except BrokenProcessPool:
        raise Fault(
            "a worker process was killed, perhaps for its memory; run the same command to go on, "
            "with fewer of them (data.workers) where memory is short"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # they end while the shards are put in place


_job: list[Job] = []  # of this worker process; a pool has no other place for it


def _begin(job: Job) -> None:
    """In a new worker: an interrupt is the parent's to handle, and its end is ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers have the cores already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _job[:] = [job]


def _ready() -> None:
    """A worker that has done this has its tokenizer."""
    _job[0].tokenizer.encode("")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _encode(window: Window) -> Encoded:
    return encode_window(window, _job[0])


def encode_window(window: Window, job: Job) -> Encoded:
    """One window's tokens. Raises UserError where a part of a long text cannot be encoded."""
    looked = documents_of(window.items, job.files, text_field=job.text_field)
    found = [_fitting(each, job.tokenizer) for each in looked]
    bad = [each for each in found if isinstance(each, Bad)]
    documents = [
        each for each in (found[i] for i in _order(window, job.seed)) if isinstance(each, Document)
    ]
    arrays, unknown = _encoded(documents, job.tokenizer)
    if unknown and not window.items[0].whole:
        raise UserError(unknown[0].message)
    kept = [document for document, ids in zip(documents, arrays, strict=True) if ids is not None]
    end = [] if job.tokenizer.end_of_text is None else [job.tokenizer.end_of_text]
    parts: list[npt.NDArray[Any]] = []
    starts = []
    count = 0
    for document, ids in zip(documents, arrays, strict=True):
        if ids is None:
            continue
        if not document.offset:
            starts.append(count)
        parts += [ids, np.array(end, dtype=np.uint32)] if document.last else [ids]
        count += len(ids) + len(end) * document.last
    nothing = np.empty(0, dtype=np.uint32)
    return Encoded(
        slice=window.slice,
        number=window.number,
        ids=np.concatenate([nothing, *parts], dtype=job.dtype, casting="same_kind"),
        starts=np.array(starts, dtype=np.int64),
        text_bytes=sum(_utf8_bytes(document.text) for document in kept),
        bad=bad + unknown,
        keys=traits.keys(
            [d for d in kept if not d.offset],
            dedup=job.dedup,
            identity=job.files[window.items[0].file].identity,
        ),
        languages=traits.languages(found) if job.languages else Counter(),
        goes_on=not window.items[-1].last,
    )


def _fitting(found: Document | Bad, tokenizer: Tokenizer) -> Document | Bad:
    """What a tokenizer can take; one that must see texts whole needs 100 bytes a character."""
    if isinstance(found, Bad) or tokenizer.cut != "nowhere" or len(found.text) <= MOST_WHOLE:
        return found
    message = f"{found.shown} has {len(found.text):,} characters; {MOST_WHOLE:,} are the most that "
    return Bad("too_long", f"{message} {tokenizer.name} can be given at once")


def _order(window: Window, seed: int | None) -> Sequence[int]:
    """In which order a window's items are taken."""
    count = len(window.items)
    if seed is None or not window.items[0].whole:
        return range(count)
    key = key_of("documents", seed, window.slice, window.number)
    keys = np.full(count, key, dtype=np.uint64)
    order: list[int] = permuted(np.arange(count, dtype=np.uint64), n=count, keys=keys).tolist()
    return order


def _encoded(
    documents: list[Document], tokenizer: Tokenizer
) -> tuple[list[npt.NDArray[np.uint32] | None], list[Bad]]:
    """Each document's ids, None for one that the tokenizer has no ids for; and those."""
    try:
        return list(_ids(documents, tokenizer)), []
    except (UnknownCharacter, UnbrokenText):
        pass
    arrays: list[npt.NDArray[np.uint32] | None] = []
    bad = []
    for document in documents:
        try:
            arrays += _ids([document], tokenizer)
        except (UnknownCharacter, UnbrokenText) as error:
            arrays.append(None)
            bad.append(_bad(document, error))
    return arrays, bad


def _bad(document: Document, error: UnknownCharacter | UnbrokenText) -> Bad:
    place = f"{document.shown}, character {document.offset + error.offset + 1:,}"
    if isinstance(error, UnbrokenText):
        return Bad("unbroken", unbroken_text(place))
    message = unknown_character(error.character, place, alphabet=error.alphabet)
    return Bad("foreign_character", message)


def _ids(documents: list[Document], tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.uint32]]:
    """Long documents are cut, for tokenizers are slow and hungry on them."""
    whole = [Piece(document.text, i, 0, True) for i, document in enumerate(documents)]
    pieces = list(recut(whole, cut=tokenizer.cut))
    encoded = itertools.chain.from_iterable(
        zip(batch, _encode_batch(batch, tokenizer), strict=True) for batch in batches(pieces)
    )
    for _, group in itertools.groupby(encoded, key=lambda pair: pair[0].document):
        parts = [ids for _, ids in group]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _encode_batch(batch: list[Piece], tokenizer: Tokenizer) -> list[npt.NDArray[np.uint32]]:
    try:
        return tokenizer.encode_batch([piece.text for piece in batch])
    except UnknownCharacter as error:
        error.offset += batch[error.text].offset
        raise


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))
