"""Read files that lie elsewhere: in ranges, one block ahead, and patiently.

    hf://    ┐
    https:// ├─ range(start, stop) ─▶ whole, or asked for again ─▶ blocks ─▶ a file to seek in
    s3://    ┘

Nothing is downloaded but what is read. What arrives short, late or not at all is asked for again
after a pause; a file that is not the one that was listed is a Fault. Two blocks are held, and for
a moment a third.
"""

from __future__ import annotations

import functools
import http.client
import io
import os
import re
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from tuppence.errors import Fault, UserError
from tuppence.store import Changed, Store
from tuppence.text.inputs import InputFile, kind_of

FIRST_BYTES = 1 << 20  # of a first read, which may be all that is wanted there
BLOCK_BYTES = 8 << 20  # of those that follow it
PAUSES = (1.0, 3.0, 10.0, 30.0, 60.0)  # seconds before each new try
LONGEST_PAUSE = 300.0  # whatever a server asks for
SECONDS = 60.0  # without a byte
AGAIN = (408, 425, 429, 500, 502, 503, 504)
HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/@]+)@([^/]+)/(.+)")
_FINAL = (FileNotFoundError, PermissionError, ssl.SSLCertVerificationError)

Got = TypeVar("Got")
Range = Callable[[int, int], bytes]


class Refused(OSError):
    """The place answered, and to ask again would not help."""


class Busy(OSError):
    """The place asks for patience: so many seconds of it."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Answer(NamedTuple):
    """A range of a file, how long the file is, and what tells this content from another."""

    content: bytes
    total: int
    identity: str


def opened(file: InputFile) -> io.BufferedReader:
    """A remote file for reading; seekable. Close it. Raises Fault where it cannot be read."""
    return io.BufferedReader(_Remote(file), buffer_size=1 << 16)


def web_file(url: str) -> InputFile:
    """The file at an address of the web. Raises UserError where none can be read there."""
    shown = shown_url(url)
    kind = kind_of(shown)
    if kind is None:
        raise UserError(f"{shown}: its name does not tell what it is, such as .jsonl.gz does")
    try:
        answer = patiently(lambda: ask(url, {}, 0, 1), shown=shown, pauses=PAUSES[:2])
    except Fault as error:
        raise UserError(str(error)) from None
    return InputFile(url, shown, *kind, answer.total, answer.identity)


def shown_url(url: str) -> str:
    """The address without what may be secret in it."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


# ---------------------------------------------------------------- a file to seek in


class _Remote(io.RawIOBase):
    """Blocks that grow while they are read one after the other; then the next one is under way."""

    def __init__(self, file: InputFile) -> None:
        self._file, self._at = file, 0
        self._closing = threading.Event()
        self._range = _range_of(file, self._closing)
        self._held, self._content = range(0), b""
        self._ahead: tuple[range, Future[bytes]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.bytes}[whence]
        self._at = max(0, base + to)
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        if self._at >= self._file.bytes:
            return 0
        if self._at not in self._held:
            self._turn_to(self._at)
        start = self._at - self._held.start
        piece = memoryview(self._content)[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._closing.set()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
            self._held, self._content, self._ahead = range(0), b"", None
        super().close()

    def _turn_to(self, at: int) -> None:
        """Hold the block that `at` is in; send for the one after it where reading goes on."""
        before, ahead = self._held, self._ahead
        goes_on = before.stop <= at <= before.stop + BLOCK_BYTES and len(before) > 0
        self._held, self._content, self._ahead = range(0), b"", None
        if ahead is not None and at in ahead[0]:
            block, content = ahead[0], ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            block = self._block(at, 2 * len(before) if goes_on else FIRST_BYTES)
            content = self._fetch(block)
        self._held, self._content = block, content
        if goes_on and block.stop < self._file.bytes:
            self._pool = self._pool or ThreadPoolExecutor(1, "read-ahead")
            following = self._block(block.stop, 2 * len(before))
            self._ahead = following, self._pool.submit(self._fetch, following)

    def _block(self, start: int, length: int) -> range:
        length = min(max(length, FIRST_BYTES), BLOCK_BYTES)
        return range(start, min(start + length, self._file.bytes))

    def _fetch(self, block: range) -> bytes:
        return patiently(
            lambda: self._range(block.start, block.stop),
            shown=self._file.shown,
            closing=self._closing,
        )


# ---------------------------------------------------------------- patience


def patiently(
    do: Callable[[], Got],
    *,
    shown: str,
    pauses: Sequence[float] | None = None,
    closing: threading.Event | None = None,
) -> Got:
    """What `do` gives, which may fail for a while. Raises Fault in one line where it goes on."""
    closing = closing or threading.Event()
    waits = PAUSES if pauses is None else pauses
    for tried in range(len(waits) + 1):
        try:
            return do()
        except Changed as error:
            raise Fault(f"{shown} is not what it was when it was listed: {_said(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            if _final(error):
                raise Fault(f"{shown} cannot be read: {_said(error)}") from None
            if tried == len(waits):
                raise Fault(
                    f"{shown} cannot be read ({_said(error)}; tried {tried + 1} times); once it "
                    "can be reached, the same command goes on from where it stopped"
                ) from None
            asked = getattr(error, "seconds", 0.0)
            if closing.wait(min(max(waits[tried], asked), LONGEST_PAUSE)):
                raise Fault(f"{shown} was closed") from None
    raise AssertionError("the last try returns or raises")


def _final(error: Exception) -> bool:
    """Whether another try would end the same way."""
    behind = (error.__cause__, getattr(error, "reason", None))
    return isinstance(error, Refused) or any(isinstance(each, _FINAL) for each in behind)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- ranges


def _range_of(file: InputFile, closing: threading.Event) -> Range:
    """How a range of this file is asked for; what arrives is checked."""
    if not file.path.startswith(("hf://", "http://", "https://")):
        return _checked(file, _of_store(file, closing))
    url, headers = _address(file.path)

    def whole(start: int, stop: int) -> bytes:
        answer = ask(url, headers, start, stop)
        # the Hub's own address has the commit in it, so only the size can be amiss there
        _same(file, answer.total, answer.identity if url == file.path else None)
        return answer.content

    return _checked(file, whole)


def _checked(file: InputFile, fetch: Range) -> Range:
    def whole(start: int, stop: int) -> bytes:
        content = fetch(start, stop)
        if len(content) != stop - start:
            raise OSError(f"{len(content):,} of {stop - start:,} bytes arrived")
        return content

    return whole


def _of_store(file: InputFile, closing: threading.Event) -> Range:
    """From a bucket. S3 compares the tag itself, with every read; of others it is asked now."""
    protocol, _, rest = file.path.partition("://")
    bucket, _, name = rest.partition("/")
    store, tag = _store(f"{protocol}://{bucket}", os.getpid()), file.identity.partition(":")[2]
    if store.protocol != "s3":
        found = patiently(lambda: store.entry(name), shown=file.shown, closing=closing)
        if found is None:
            raise Fault(f"{file.shown} is gone since it was listed")
        patiently(lambda: _same(file, found.bytes, f"etag:{found.tag}"), shown=file.shown)
    return lambda start, stop: store.read_range(name, start, stop, tag)


@functools.lru_cache(maxsize=4)
def _store(bucket: str, process: int) -> Store:
    """A bucket, which takes a tenth of a second to begin with; not of use to a forked process."""
    return Store(bucket)


def _same(file: InputFile, total: int, identity: str | None) -> None:
    if total != file.bytes:
        raise Changed(f"it has {total:,} bytes, and had {file.bytes:,}")
    if identity not in (None, file.identity):
        raise Changed(f"it is {identity}, and was {file.identity}")


def _address(path: str) -> tuple[str, dict[str, str]]:
    """Where the web has a file, and the headers that say who asks (the Hub's library knows)."""
    found = HUB_FILE.fullmatch(path)
    if found is None:
        return path, {}
    import huggingface_hub

    repository, revision, name = found.groups()
    url = huggingface_hub.hf_hub_url(repository, name, repo_type="dataset", revision=revision)
    token = huggingface_hub.get_token()
    return url, {"Authorization": f"Bearer {token}"} if token else {}


def ask(url: str, headers: dict[str, str], start: int, stop: int) -> Answer:
    """Bytes `start` to `stop` of a file of the web, fewer where they did not all arrive.

    Raises Busy or another OSError where a later try may do better, Refused where none will.
    `headers` stay with this host where it sends us on to another.
    """
    asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, headers={"User-Agent": "tuppence"} | asked)
    for name, value in headers.items():
        request.add_unredirected_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return _answer(answer, start, stop)
    except urllib.error.HTTPError as error:
        with error:
            said = f"HTTP {error.code} {error.reason}".strip()
            if error.code in AGAIN:
                raise Busy(said, _seconds(error.headers.get("Retry-After", ""))) from None
        raise Refused(said) from None


def _answer(answer: http.client.HTTPResponse, start: int, stop: int) -> Answer:
    told = answer.headers
    tags = (("etag", told.get("ETag")), ("modified", told.get("Last-Modified")))
    packed = told.get("Content-Encoding", "identity") not in ("identity", "")
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", told.get("Content-Range", "").strip())
    length = int(told.get("Content-Length", -1))
    if answer.status == 206 and part is not None and int(part[1]) == start and not packed:
        content, total = answer.read(stop - start), int(part[2])
    elif answer.status == 200 and 0 <= length <= BLOCK_BYTES and not packed:
        content, total = answer.read(length)[start:stop], length  # a small file, all of it
    else:
        raise Refused("this server gives no parts of a file; download it and give its path")
    identity = next((f"{kind}:{tag}" for kind, tag in tags if tag), f"bytes:{total}")
    return Answer(content, total, identity)


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.strip().isdecimal() else 0.0
