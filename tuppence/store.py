"""One folder on an object store, through fsspec: few verbs, one kind of error, verified sends.

What can be compared after a send, besides the size:

    s3://     the ETag is the MD5 of what was sent, or the MD5 of its parts' MD5s. Where encryption
              makes it something else (seen on the first small object) only the size; the library
              sends a checksum with each part, which the store compares on arrival
    gs://     md5Hash, where the store has one
    others    (file://, memory://) nothing is told, so the object is read back
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tuppence.errors import UserError

PART_BYTES = 16 << 20  # of a large object; four at a time are in memory
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000
S3_SECONDS = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
KNOWN = ("s3", "gs", "file", "memory")
READ_BYTES = 1 << 20
S3_TAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
TAGS = ("ETag", "md5Hash", "etag")  # the first that a library tells


class Away(OSError):
    """The store did not do what was asked of it: no network, no permission, not arrived whole."""


class Changed(Away):
    """Another object stands at that name now."""


@dataclass(frozen=True)
class Entry:
    """An object as a listing tells it: its size, and a tag that another content would not have."""

    bytes: int
    tag: str


@dataclass(frozen=True)
class Digest:
    """What an object must be: its size, its sha256, and what the store will call its content."""

    bytes: int
    sha256: str
    tag: str


def is_url(text: str) -> bool:
    """Whether a person's words name a bucket and not a folder."""
    return "://" in text


def protocol_of(url: str) -> str:
    """The URL's first part. Raises UserError for stores that nothing here was written for."""
    protocol = url.partition("://")[0]
    if protocol not in KNOWN:
        raise UserError(f"{url}: write s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
    if not url.partition("://")[2].strip("/"):
        raise UserError(f"{url}: name a bucket, such as {protocol}://my-bucket/runs")
    return protocol


class Store:
    """The objects below one URL, by their names relative to it."""

    def __init__(self, url: str) -> None:
        self.url, self.protocol = url.rstrip("/"), protocol_of(url)
        self._fs, self._root = _filesystem(self.url, self.protocol)
        self._bucket, _, self._key = self._root.partition("/")
        self._tags_compare = True
        # S3's library asks for the size first where it may read in parts
        self._in_one = {"max_concurrency": 1} if self.protocol == "s3" else {}

    def reach(self) -> None:
        """Raises UserError in one line where the bucket cannot be used at all."""
        bucket = self._bucket
        try:
            if self.protocol in ("s3", "gs") and not self._fs.exists(bucket):
                self._fs.ls(bucket)  # says why
            self._fs.find(self._root, maxdepth=1)
        except FileNotFoundError:
            if self.protocol in ("s3", "gs"):
                raise UserError(
                    f"{self.url}: there is no bucket {bucket}; make it, or correct the name"
                ) from None
        except Exception as error:  # each library has kinds of its own
            raise UserError(f"{self.url}: {_advice(error, self.protocol)}") from error

    def bucket_exists(self) -> bool:
        """Whether there is the bucket that this URL is in. Raises UserError where that cannot be
        asked: no credentials, no network, or another's bucket."""
        if self.protocol not in ("s3", "gs"):
            return True
        try:
            if self._fs.exists(self._bucket):
                return True
            self._fs.ls(self._bucket)  # says why
        except FileNotFoundError:
            return False
        except Exception as error:  # each library has kinds of its own
            raise UserError(f"{self.url}: {_advice(error, self.protocol)}") from error
        return True

    def make_bucket(self, region: str | None = None) -> None:
        """Make the bucket, in a region of its cloud where one is named."""
        there = {"s3": {"region_name": region}, "gs": {"location": region}}[self.protocol]
        plain = region is None or (self.protocol == "s3" and region == "us-east-1")  # S3 says so
        try:
            self._fs.mkdir(self._bucket, **({} if plain else there))
        except Exception as error:
            raise UserError(
                f"{self.url}: bucket {self._bucket} cannot be made: {_advice(error, self.protocol)}"
            ) from error

    def drop_bucket(self) -> None:
        """Delete the bucket, which is empty."""
        with self._told("delete the bucket of"):
            self._fs.rmdir(self._bucket)

    def find(self, under: str = "") -> dict[str, int]:
        """Every object's size by its name."""
        return {name: entry.bytes for name, entry in self.entries(under).items()}

    def entries(self, under: str = "", *, depth: int | None = None) -> dict[str, Entry]:
        """Every object by its name, or those not deeper than `depth` below `under`."""
        with self._told("list"):
            try:
                found = self._fs.find(self._path(under), maxdepth=depth, detail=True)
            except FileNotFoundError:
                return {}
        cut = len(self._root) + 1
        return {path[cut:]: _entry(info) for path, info in found.items()}

    def entry(self, name: str) -> Entry | None:
        """One object, or None where there is none of this name."""
        with self._told(f"look at {name} on"):
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
        return _entry(info) if info.get("type") == "file" else None

    def folders(self) -> list[str]:
        """Names of the folders directly below."""
        with self._told("list"):
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
        return sorted(
            i["name"].rstrip("/").rpartition("/")[2] for i in found if i["type"] == "directory"
        )

    def read(self, name: str) -> bytes | None:
        """A small object's content, or None where there is none."""
        with self._told(f"read {name} from"):
            try:
                content: bytes = self._fs.cat_file(self._path(name), **self._in_one)
            except FileNotFoundError:
                return None
        return content

    def read_range(self, name: str, start: int, stop: int, tag: str) -> bytes:
        """Bytes `start` to `stop` of an object, fewer where it did not all arrive.

        Raises Changed where a store that can tell (S3) has another object than the one of `tag`.
        """
        with self._told(f"read {name} from"):
            if self.protocol == "s3":
                return self._s3_range(name, start, stop, tag)
            return bytes(self._fs.cat_file(self._path(name), start=start, end=stop))

    def _s3_range(self, name: str, start: int, stop: int, tag: str) -> bytes:
        import fsspec.asyn

        async def fetch() -> bytes:
            asked = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": f'"{tag}"'}
            key = f"{self._key}/{name}".strip("/")
            told = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=key, **asked)
            async with told["Body"] as body:
                return bytes(await body.read())

        try:
            return bytes(fsspec.asyn.sync(self._fs.loop, fetch))
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "412"):
                raise Changed(f"{name} on {self.url} has changed") from error
            raise

    def write(self, name: str, content: bytes) -> None:
        """Replace a small object, and see that it arrived."""
        digest = self.digest_of(content)
        with self._told(f"write {name} to"):
            told = self._fs.pipe_file(self._path(name), content)
        tag = told.get("ETag", "").strip('"') if isinstance(told, dict) else None
        if not self._tags_compare or tag != digest.tag:  # S3's answer may have said it all
            self._arrived(name, digest)

    def probe(self, name: str, content: bytes) -> None:
        """Write a small object and learn from it whether this bucket's ETags are MD5s."""
        with self._told(f"write {name} to"):
            self._fs.pipe_file(self._path(name), content)
            told = self._fs.info(self._path(name))
        if self.protocol == "s3":
            self._tags_compare = told["ETag"].strip('"') == _md5(content).hexdigest()
        self._arrived(name, self.digest_of(content))

    def send(self, local: Path, name: str, digest: Digest) -> None:
        """Send a file, and see that it arrived whole."""
        options: dict[str, Any] = {}
        if self.protocol == "s3":
            options = {"chunksize": part_bytes(digest.bytes), "max_concurrency": PARTS_AT_ONCE}
        with self._told(f"send {name} to"):
            self._fs.put_file(str(local), self._path(name), **options)
        self._arrived(name, digest)

    def copy(self, name: str, to: str) -> None:
        """Copy inside the store: nothing is sent."""
        options = {"preserve_etag": True} if self.protocol == "s3" else {}
        with self._told(f"copy {name} in"):
            self._fs.cp_file(self._path(name), self._path(to), **options)

    def fetch(self, name: str, local: Path) -> None:
        """Bring an object. Raises FileNotFoundError where there is none."""
        with self._told(f"fetch {name} from"):
            self._fs.get_file(self._path(name), str(local))

    def delete(self, name: str) -> None:
        """Delete an object; that it is gone already is fine."""
        with self._told(f"delete {name} from"):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def drop_unfinished(self, under: str) -> None:
        """Drop the parts of sends that a kill cut off: S3 keeps, and bills, them unseen."""
        if self.protocol != "s3":
            return
        bucket, _, key = self._path(under).partition("/")
        with self._told("list unfinished sends to"):
            found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key + "/")
            for each in found.get("Uploads", ()):
                ids = {"Key": each["Key"], "UploadId": each["UploadId"]}
                self._fs.call_s3("abort_multipart_upload", Bucket=bucket, **ids)

    def holds(self, name: str, digest: Digest) -> bool:
        """Whether an object is there with this size and, where it can be compared, this content."""
        with self._told(f"look at {name} on"):
            try:
                info = self._fs.info(self._path(name))
                if info.get("type") != "file" or info["size"] != digest.bytes:
                    return False
                if self.protocol == "s3":
                    return self._same_tag(info["ETag"].strip('"'), digest.tag)
                if self.protocol == "gs":
                    return str(info.get("md5Hash") or digest.tag) == digest.tag
                with self._fs.open(self._path(name), "rb") as there:
                    return _read(there, self.protocol).sha256 == digest.sha256
            except FileNotFoundError:
                return False

    def digest(self, local: Path) -> Digest:
        """Of a local file, read once."""
        with local.open("rb") as content:
            return _read(content, self.protocol, local.stat().st_size)

    def digest_of(self, content: bytes) -> Digest:
        """Of a small object, which is sent in one piece."""
        return _read(io.BytesIO(content), self.protocol)

    def _same_tag(self, told: str, expected: str) -> bool:
        """A tag of another form than ours says nothing of the content."""
        same_form = S3_TAG.fullmatch(told) and told[32:] == expected[32:]
        return not self._tags_compare or not same_form or told == expected

    def _arrived(self, name: str, digest: Digest) -> None:
        if not self.holds(name, digest):
            raise Away(f"{name} did not arrive whole at {self.url}")

    def advice(self, error: Exception) -> str:
        """What a person can do about a store that cannot be used."""
        told = error.__cause__ if isinstance(error, Away) else error
        return _advice(told if isinstance(told, Exception) else error, self.protocol)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """One kind of error for all that the libraries raise."""
        try:
            yield
        except Away:
            raise
        except FileNotFoundError as error:
            if doing.startswith("fetch"):
                raise
            raise Away(f"cannot {doing} {self.url}: not found") from error
        except Exception as error:  # each library has kinds of its own
            raise Away(f"cannot {doing} {self.url}: {_reason(error)}") from error


def _filesystem(url: str, protocol: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path on it. Nothing is asked of the network yet."""
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    options |= {"auto_mkdir": True} if protocol == "file" else {}
    options |= {"config_kwargs": dict(S3_SECONDS)} if protocol == "s3" else {}
    try:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except ImportError:
        raise UserError(
            f"{url} needs libraries that are not installed: pip install 'tuppence[bucket]'"
        ) from None
    except Exception as error:  # a library looks for credentials when it is made
        raise UserError(f"{url}: {_advice(error, protocol)}") from error
    return filesystem, str(root).rstrip("/")


def part_bytes(size: int) -> int:
    """Bytes of each part of a send: as usual, or more where the parts would be too many."""
    part = PART_BYTES
    while size > part * MOST_PARTS:
        part *= 2
    return part


def _read(content: BinaryIO, protocol: str, size: int = 0) -> Digest:
    """sha256 and the store's tag of a content, in one pass."""
    part = part_bytes(size)
    in_parts = protocol == "s3" and size >= 2 * part  # below it the library sends one piece
    sha256, md5s, count = hashlib.sha256(), [_md5()], 0
    while block := content.read(READ_BYTES):  # of which a part holds a whole number
        if in_parts and count and count % part == 0:
            md5s.append(_md5())
        sha256.update(block)
        if protocol in ("s3", "gs"):
            md5s[-1].update(block)
        count += len(block)
    return Digest(count, sha256.hexdigest(), _tag(md5s, protocol))


def _tag(md5s: list[Any], protocol: str) -> str:
    """What the store calls a content whose parts have these MD5s."""
    if protocol == "gs":
        return base64.b64encode(md5s[0].digest()).decode()
    if len(md5s) == 1:
        return str(md5s[0].hexdigest())
    return f"{_md5(b''.join(md5.digest() for md5 in md5s)).hexdigest()}-{len(md5s)}"


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def _entry(info: dict[str, Any]) -> Entry:
    tag = next((info[name] for name in TAGS if info.get(name)), "")
    return Entry(int(info["size"]), str(tag).strip('"'))


def _code(error: OSError) -> str:
    """What S3 itself answered, where that is behind an error of the library."""
    answer: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def _reason(error: Exception) -> str:
    """The first line of what a library says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _advice(error: Exception, protocol: str) -> str:
    """What a person can do about a bucket that cannot be used at the start."""
    name = type(error).__name__
    where = "environment or ~/.aws" if protocol == "s3" else "gcloud auth application-default login"
    if "Credential" in name or "credential" in str(error).lower():
        return f"no credentials ({_reason(error)}); give them the library's own way ({where})"
    if isinstance(error, PermissionError):
        return f"these credentials may not use it ({_reason(error)}); see the bucket's policy"
    return f"cannot be reached ({_reason(error)}); check the network and the address"
