"""A machine behind the system's own ssh: commands there, files to it, streams from it.

    ssh [-F FILE] HOST bash -s -- VERB WORDS  <  assets/ssh.sh

Keys, ports, users and jump hosts are ~/.ssh/config's matter. Nothing is asked on the terminal
(BatchMode), and a connection that has died is noticed within a minute.
"""

import io
import os
import shlex
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tuppence.errors import Fault, UserError
from tuppence.files import asset

MARK = "tuppence:"
STREAM = b"tuppence:stream=\n"
LOST = 255  # ssh's own exit code: the connection, not the command
OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
READ_BYTES = 1 << 16
ADVICE = (  # of what ssh says, and what can be done about it
    ("could not resolve", "no machine of that name; check it, or add it to ~/.ssh/config"),
    ("remote host identification has changed", "its key is another; see `ssh-keygen -R`"),
    ("host key verification failed", "its key is not known here; connect once with ssh by hand"),
    ("permission denied", "it refuses the key: ssh must work without a password (`ssh-copy-id`)"),
    ("bad configuration option", "the ssh config file is not valid"),
    ("can't open user config file", "the ssh config file cannot be read"),
)


class Lost(Fault):
    """The machine cannot be reached, now."""


@dataclass(frozen=True)
class Host:
    """`name` as ssh takes it: an alias, a host, user@host. `config` is ssh's -F."""

    name: str
    config: str | None = None

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith("-") or any(c.isspace() for c in self.name):
            raise UserError(f"--ssh {self.name!r}: name a host as ssh takes it, such as user@box")

    def ask(self, *words: str) -> dict[str, list[str]]:
        """What the far side answers to a verb of ssh.sh, by key. Raises Lost, UserError, Fault."""
        with asset("ssh.sh").open("rb") as script:
            done = self._run(_script(words), script)
        answers: dict[str, list[str]] = {}
        for line in done.decode(errors="replace").splitlines():
            if line.startswith(MARK):
                key, _, value = line.removeprefix(MARK).partition("=")
                answers.setdefault(key, []).append(value)
        return answers

    def send(self, content: bytes | Iterable[tuple[str, Path]], script: str) -> None:
        """Give bytes, or a tar of (name, file) pairs, to a bash script there on its stdin."""
        process = self._popen(f"bash -c {shlex.quote(script)}", subprocess.PIPE)
        assert process.stdin is not None
        try:
            if isinstance(content, bytes):
                process.stdin.write(content)
            else:
                with tarfile.open(fileobj=process.stdin, mode="w|", bufsize=1 << 20) as tar:
                    for name, path in content:
                        tar.add(path, arcname=name)
            process.stdin.close()
        except BrokenPipeError:
            pass  # the far side says why
        process.stdin = None
        _, err = process.communicate()
        self._check(process.returncode, err)

    def test(self, script: str) -> bool:
        """Whether a bash condition holds there."""
        process = self._popen(f"bash -c {shlex.quote(script)}", subprocess.DEVNULL)
        _, err = process.communicate()
        if process.returncode != 1:
            self._check(process.returncode, err)
        return process.returncode == 0

    def stream(self, *words: str) -> "Stream":
        """What a verb of ssh.sh sends, as it comes."""
        with asset("ssh.sh").open("rb") as script:
            return Stream(self, self._popen(_script(words), script))

    def _run(self, remote: str, stdin: IO[bytes]) -> bytes:
        process = self._popen(remote, stdin)
        out, err = process.communicate()
        self._check(process.returncode, err)
        return out

    def _popen(self, remote: str, stdin: IO[bytes] | int) -> "subprocess.Popen[bytes]":
        config = ("-F", self.config) if self.config else ()
        words = ["ssh", *config, *OPTIONS, "--", self.name, remote]
        pipe = subprocess.PIPE
        try:
            return subprocess.Popen(words, stdin=stdin, stdout=pipe, stderr=pipe)
        except FileNotFoundError:
            raise UserError("no ssh here; install OpenSSH's client") from None

    def _check(self, code: int, err: bytes) -> None:
        if not code:
            return
        lines = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1].strip() if lines else f"exit code {code}"
        if code != LOST:
            raise _there(self.name, "\n".join(lines), said)
        whole = "\n".join(lines).lower()
        for words, advice in ADVICE:
            if words in whole:
                raise UserError(f"--ssh {self.name}: {advice} ({said})")
        raise Lost(f"{self.name} cannot be reached: {said}; is it on, and is the port right?")


class Stream:
    """The bytes that come after the mark. `lost` tells, at the end, whether the connection died."""

    def __init__(self, host: Host, process: "subprocess.Popen[bytes]") -> None:
        self.host, self.process, self.lost = host, process, False

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        self.process.terminate()
        self.process.wait()

    def __iter__(self) -> Iterator[bytes]:
        assert self.process.stdout is not None
        head, begun = b"", False
        while block := os.read(self.process.stdout.fileno(), READ_BYTES):
            if not begun:
                head += block
                _, mark, block = head.partition(STREAM)
                begun = bool(mark)
            if begun and block:
                yield block
        self.process.wait()
        self.lost = self.process.returncode == LOST or self.process.returncode < 0

    def file(self) -> IO[bytes]:
        """The same to be read as a file."""
        return io.BufferedReader(_Raw(iter(self)))

    def check(self) -> None:
        """Raises what ended it, where that was not its own end."""
        assert self.process.stderr is not None
        self.host._check(self.process.wait(), self.process.stderr.read())


class _Raw(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.left = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        self.left = self.left or next(self.blocks, b"")
        piece, self.left = self.left[: len(buffer)], self.left[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _script(words: tuple[str, ...]) -> str:
    return " ".join(["bash -s --", *map(shlex.quote, words)])


def _there(name: str, whole: str, said: str) -> Exception:
    """What a command there failed of."""
    if "No space left" in whole or "Disk quota exceeded" in whole:
        return UserError(f"{name}: no room on its disk; make some, or give --folder elsewhere")
    if "Permission denied" in whole or "Read-only file system" in whole:
        return UserError(f"{name}: {said}; give a folder of yours with --folder")
    if "not found" in whole and "bash" in whole:
        return UserError(f"{name} has no bash; install it there")
    return Fault(f"{name}: {said}")
