"""Documents of an input, one after another in this process: for looks at it, and for what learns
from it (an alphabet, a vocabulary). Broken ones are passed over; preparing it names them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from tuppence.errors import UserError
from tuppence.text.documents import Bad, Document, documents_of
from tuppence.text.formats import Meter, read_items
from tuppence.text.inputs import InputFile
from tuppence.text.slices import Slice, slices_of
from tuppence.tokenizer.pieces import Cut

SAMPLED_SLICES = 32  # of a large input, from its beginning to its end


def documents(
    files: Sequence[InputFile],
    *,
    text_field: str = "text",
    cut: Cut = "anywhere",
    meter: Meter | None = None,
) -> Iterator[Document]:
    """All documents in reading order, long ones in pieces. Raises UserError where there are some,
    and every one is broken."""
    bad: list[Bad] = []
    good = False
    meter = meter or Meter()
    for slice_ in slices_of(files):
        for found in _of_slice(slice_, files, text_field, cut, meter, bad):
            good = True
            yield found
    if bad and not good:
        raise UserError(bad[0].message)


def sampled(
    files: Sequence[InputFile], *, chars: int, text_field: str = "text", cut: Cut = "before_space"
) -> Iterator[str]:
    """About `chars` characters of text, or all there is, from places all over the input."""
    slices = slices_of(files)
    all_of_it = chars >= sum(file.bytes for file in files)
    step = 1 if all_of_it else max(1, len(slices) // SAMPLED_SLICES)
    chosen = range(0, len(slices), step)
    for number in chosen:
        left = -(-chars // len(chosen))
        for document in _of_slice(slices[number], files, text_field, cut, Meter(), []):
            yield document.text
            left -= len(document.text)
            if left <= 0:
                break


def has_one_document(files: Sequence[InputFile], *, text_field: str = "text") -> bool:
    """Whether there is exactly one document; reads no further than the start of a second."""
    texts = sum(file.kind == "txt" for file in files)
    if texts > 1 or (texts == 1 and len(files) == 1):
        return texts == 1
    ends = (found for found in documents(files, text_field=text_field) if found.last)
    return len(list(itertools.islice(ends, 2))) == 1


def _of_slice(
    slice_: Slice,
    files: Sequence[InputFile],
    text_field: str,
    cut: Cut,
    meter: Meter,
    bad: list[Bad],
) -> Iterator[Document]:
    """The documents of a slice; `bad` gets the first of those that are none."""
    for part in slice_:
        items = read_items(files[part.file], part, text_field=text_field, cut=cut, meter=meter)
        for item in items:
            (found,) = documents_of([item], files, text_field=text_field)
            if isinstance(found, Document):
                yield found
            elif not bad:
                bad.append(found)
