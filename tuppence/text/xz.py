"""The content of .xz data: streams one after another, with zeros between them.

Python's own reader takes a stream that does not decode for the end of the file; here it is damage.
"""

from __future__ import annotations

import lzma
from typing import BinaryIO

READ_BYTES = 1 << 16


class Xz:
    """A reader of the decompressed bytes. `read` raises LZMAError or EOFError for damage."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def read(self, n: int, /) -> bytes:
        """At most `n` bytes; none at the end."""
        found = b""
        while not found:
            packed = b""
            if self._decoder.eof:
                packed = self._next_stream()
                if not packed:
                    break
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            elif self._decoder.needs_input:
                packed = self._raw.read(READ_BYTES)
                if not packed:
                    raise EOFError("it ends before its end marker")
            found = self._decoder.decompress(packed, n)
        return found

    def _next_stream(self) -> bytes:
        """What follows the zeros after a stream; nothing where nothing does."""
        packed = self._decoder.unused_data or self._raw.read(READ_BYTES)
        while packed and not (rest := packed.lstrip(b"\0")):
            packed = self._raw.read(READ_BYTES)
        return rest if packed else b""
