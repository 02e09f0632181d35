"""Tokens in and out, with the other projects' own programs: nanoGPT's and llm.c's.

    python bench/interchange.py --nanogpt ~/nanoGPT --llmc ~/llm.c [--peer-python PYTHON]

Both checkouts are copied to a temporary folder first. Their scripts run as they are, but for what
would be downloaded: the text and GPT-2's ranks come from our package, and a llama-3 tokenizer,
which cannot be had without an account, is one that counts from GPT-2's ids up. Nothing here is a
figure of speed: each line is a claim that holds or does not, and one that does not is exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, rows, tuppence

REPOSITORY = Path(__file__).resolve().parents[1]
PATHS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
STEPS = 20
LLAMA_FROM = 70_000  # where the ids of the stand-in for llama-3's tokenizer begin

# Runs a checkout's script in its folder; its words follow. No network is asked for anything.
DRIVER = """
import base64, runpy, sys, types
script, ranks_path, llama_from = sys.argv[1:4]
sys.argv = [script, *sys.argv[4:]]
sys.path.insert(0, script.rpartition("/")[0])
import tiktoken
ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, open(ranks_path, "rb"))}
encoding = tiktoken.Encoding("gpt2", pat_str=sys.stdin.read(), mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})
tiktoken.get_encoding = lambda name: encoding
class Llama:
    from_pretrained = classmethod(lambda cls, name: cls())
    def encode(self, text, **options):
        first = int(llama_from)
        return [first + i for i in encoding.encode_ordinary(text)] if text else [first + 50256]
stand_in = types.ModuleType("transformers")
stand_in.AutoTokenizer = Llama
sys.modules["transformers"] = stand_in
runpy.run_path(script, run_name="__main__")
"""

NANOGPT = shlex.split(
    "--device=cpu --compile=False --dtype=float32 --block_size=64 --batch_size=8 --n_layer=2 "
    "--n_head=2 --n_embd=64 --dropout=0.0 --gradient_accumulation_steps=1 --eval_iters=4 "
    "--eval_interval=10 --max_iters=20 --learning_rate=1e-3 --warmup_iters=0"
)
TINY = shlex.split(
    "model.family=gpt2 model.n_layer=2 model.n_head=2 model.n_embd=64 model.sequence_len=64 "
    f"train.batch_tokens=512 train.eval_tokens=512 train.sample_tokens=0 budget.steps={STEPS} "
    "machine.usd_per_hour=1 machine.threads=1 machine.gpu=cpu train.precision=fp32 "
    "train.attention=sdpa train.optimizer=adamw train.learning_rate=1e-3"
)


@dataclass(frozen=True)
class Claim:
    """What was looked at, what was seen, and whether it is as it should be."""

    what: str
    holds: bool
    seen: str


class Place:
    """A temporary folder with copies of the checkouts and what is made from them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.python = folder, arguments.peer_python
        self.nanogpt, self.llmc = folder / "nanoGPT", folder / "llm.c"
        leave = shutil.ignore_patterns(".git", "*.bin", "*.pkl", "input.txt", "tinyshakespeare")
        shutil.copytree(arguments.nanogpt, self.nanogpt, ignore=leave)
        shutil.copytree(arguments.llmc, self.llmc, ignore=leave)
        self._give_text()
        self.env = environment(folder / "cache", **PATHS)

    def _give_text(self) -> None:
        """What their scripts would download, where they look for it first."""
        from tuppence.files import asset

        data = self.llmc / "dev/data/tinyshakespeare"
        data.mkdir()
        for name in ("shakespeare", "shakespeare_char"):
            shutil.copy(asset("shakespeare.txt"), self.nanogpt / "data" / name / "input.txt")
        shutil.copy(asset("shakespeare.txt"), data / "tiny_shakespeare.txt")

    def ours(self, *words: str) -> Any:
        """The document of a command of tuppence."""
        return tuppence(*words, folder=self.folder, env=self.env)[1]

    def theirs(self, script: Path, *words: str) -> str:
        """What a checkout's own script prints."""
        from tuppence.files import asset
        from tuppence.tokenizer.ranks import GPT2

        driver = self.folder / "driver.py"
        driver.write_text(DRIVER, encoding="utf-8")
        given = [str(script), str(asset(GPT2.file)), str(LLAMA_FROM)]
        return self._run([str(driver), *given, *words], cwd=script.parent, said=GPT2.split.regex)

    def train_nanogpt(self, dataset: str) -> list[str]:
        """The lines with losses that nanoGPT's train.py prints, without their times."""
        words = ["train.py", *NANOGPT, f"--dataset={dataset}", f"--out_dir=out-{dataset}"]
        out = self._run(words, cwd=self.nanogpt)
        return re.findall(
            r"^(?:step|iter) \d+: [a-z ]*loss [\d.]+(?:, val loss [\d.]+)?", out, re.M
        )

    def _run(self, words: list[str], *, cwd: Path, said: str = "") -> str:
        env = {key: value for key, value in self.env.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, *words],
            cwd=cwd,
            env=env,
            input=said,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{words[0]}: exit {done.returncode}\n{done.stderr[-2000:]}")
        return done.stdout


# ---------------------------------------------------------------- nanoGPT on ours


def nanogpt_on_ours(place: Place) -> Iterator[Claim]:
    """What `prepare --export nanogpt` writes, beside what nanoGPT's own script does."""
    data = place.nanogpt / "data"
    place.theirs(data / "shakespeare_char/prepare.py")
    export = ["--export", "nanogpt", "--out"]
    place.ours("prepare", "shakespeare", *export, str(data / "ours_char"))
    place.ours("prepare", "shakespeare", "data.tokenizer=gpt2", *export, str(data / "ours_gpt2"))
    for name in ("train.bin", "val.bin"):
        mine, other = (read(data / f"{side}_char" / name) for side in ("ours", "shakespeare"))
        yield Claim(f"characters: {name} is theirs, byte for byte", mine == other, size(mine))
    first, second = (place.train_nanogpt(f"{side}_char") for side in ("shakespeare", "ours"))
    seen = f"{len(second)} lines; {second[0]}; {second[-1]}"
    yield Claim("nanoGPT trains on our characters: losses as on its own", first == second, seen)
    third = place.train_nanogpt("ours_gpt2")
    fell = loss_of(third[-1]) < loss_of(third[0]) and len(third) == len(second)
    yield Claim("nanoGPT trains on our GPT-2 tokens", fell, f"{third[0]}; {third[-1]}")


def loss_of(line: str) -> float:
    return float(line.rpartition("loss ")[2])


# ---------------------------------------------------------------- we on theirs


def we_on_theirs(place: Place) -> Iterator[Claim]:
    """Training on the files of each project, where they are."""
    data = place.nanogpt / "data"
    place.theirs(data / "shakespeare/prepare.py")
    yield from trained(place, "nanoGPT's characters", data / "shakespeare_char", "char")
    yield from trained(place, "nanoGPT's GPT-2 tokens", data / "shakespeare", "gpt2")
    script = place.llmc / "dev/data/tinyshakespeare.py"
    place.theirs(script)
    shards = script.with_name("tinyshakespeare")
    yield from trained(place, "llm.c's gpt-2 files", shards, "gpt2")
    yield from trained(place, "modded-nanogpt's names", modded(place, shards), "gpt2")
    place.theirs(script, "--model_desc", "llama-3")
    yield from trained(place, "llm.c's llama-3 files", shards, str(wide_tokenizer(place)))


def trained(place: Place, what: str, source: Path, tokenizer: str) -> Iterator[Claim]:
    """Some steps on a folder; the tokens trained on are the files', and none was copied."""
    name = re.sub(r"\W+", "-", what)
    before = {path: read(path) for path in sorted(source.iterdir())}
    words = [f"data.source={source}", f"data.tokenizer={tokenizer}"]
    place.ours("train", "shakespeare", *TINY, *words, f"name={name}")
    run = place.folder / "runs" / name
    losses = [row["loss"] for row in rows(run, "metrics")]
    fell = len(losses) == STEPS and losses[-1] < losses[0]
    loss = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps"
    yield Claim(f"we train on {what}", fell, loss)
    folder = place.folder / json.loads((run / "env.json").read_text())["data_folder"]
    sha, same, windows = replayed(folder, source, run)
    told = rows(run, "metrics")[-1]["tokens_sha"] == sha
    intact = before == {path: read(path) for path in sorted(source.iterdir())}
    copied = any(folder.rglob("*.bin"))
    seen = f"{windows} windows are slices of the files; tokens_sha {sha[:12]}"
    holds = told and same and intact and not copied
    yield Claim("  on the files' own tokens, in place", holds, seen)


def replayed(folder: Path, source: Path, run: Path) -> tuple[str, bool, int]:
    """The hash of the batches that the run must have seen, whether each row of them stands in the
    training files as they are read by their projects' rules, and how many rows there were."""
    from tuppence.data.loader import Loader, rolling_sha

    plan = json.loads((run / "plan.json").read_text())
    length, batch = plan["model"]["sequence_len"], plan["step"]["batch_sequences"]
    train = [path for path in sorted(source.glob("*.bin")) if "train" in path.name]
    stream = np.concatenate([by_their_rules(path) for path in train]).astype(np.int64)
    loader = Loader(folder, sequence_len=length, batch_size=batch, seed=plan["step"]["seed"])
    sha, same = hashlib.sha256(b"").hexdigest(), loader.tokens == len(stream)
    for step in range(STEPS):
        found = loader.batch(step)
        sha = rolling_sha(sha, found)
        same = same and all(stands_in(row, stream) for row in found)
    loader.close()
    return sha, same, STEPS * batch


def stands_in(row: Any, stream: Any) -> bool:
    """Whether the row is a slice of the stream."""
    starts = np.flatnonzero(stream[: len(stream) - len(row) + 1] == row[0])
    return any(np.array_equal(stream[start : start + len(row)], row) for start in starts)


def by_their_rules(path: Path) -> Any:
    """A file's tokens, read without our code."""
    head = np.fromfile(path, dtype=np.int32, count=3)
    if head[0] == 20240520:
        return np.fromfile(path, dtype=np.uint16, offset=1024)
    if head[0] == 20240801:
        return np.fromfile(path, dtype=np.uint32, offset=1024)
    return np.fromfile(path, dtype=np.uint16)


def modded(place: Place, shards: Path) -> Path:
    """llm.c's files by modded-nanogpt's names, cut in three."""
    from tuppence.data.shards import write_shard

    folder = place.folder / "fineweb10B"
    folder.mkdir()
    train, val = sorted(shards.glob("*_train.bin")), sorted(shards.glob("*_val.bin"))
    for i, part in enumerate(np.array_split(by_their_rules(train[0]), 3), start=1):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part, vocab_size=50_257)
    shutil.copy(val[0], folder / "fineweb_val_000000.bin")
    return folder


def wide_tokenizer(place: Place) -> Path:
    """A tokenizer.json of as many ids as the stand-in for llama-3's."""
    path = place.folder / "wide" / "tokenizer.json"
    path.parent.mkdir()
    words = {str(i): i for i in range(LLAMA_FROM + 50_257)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "0"}
    empty = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
    rules = {"version": "1.0", "added_tokens": [], **dict.fromkeys(empty), "model": model}
    path.write_text(json.dumps(rules), encoding="utf-8")
    return path.parent


# ---------------------------------------------------------------- llm.c on ours

# llm.c's own loader, over every shard: the first batch of each, and the tokens in all.
READER = """
#include "llmc/dataloader.h"
int main(int argc, char **argv) {
    DataLoader loader;
    int B = 2, T = 32;
    dataloader_init(&loader, argv[1], B, T, 0, 1, 0);
    for (size_t i = 0; i < loader.glob_result.gl_pathc; i++) {
        dataloader_load_shard_(&loader, i);
        loader.current_sample_idx = 0;
        dataloader_load_batch(&loader);
        printf("%s", loader.glob_result.gl_pathv[i]);
        for (int t = 0; t < B * T; t++) printf(" %d", loader.inputs[t]);
        printf("\\n");
    }
    printf("%zu\\n", loader.num_tokens);
    dataloader_free(&loader);
    return 0;
}
"""


def llmc_on_ours(place: Place) -> Iterator[Claim]:
    """Our shards by llm.c's rules: magic, version, count and size, in the order of a glob."""
    from tuppence.data.prepare import Options, prepare

    options = Options(shard_tokens=50_000)
    made = prepare(
        source="shakespeare", tokenizer="gpt2", root=place.folder / "split", options=options
    )
    folder, out = str(made.folder), place.folder / "tiny"
    words = [f"data.source={folder}", "data.tokenizer=none"]
    place.ours("prepare", *words, "--export", "llmc", "--out", str(out))
    for split in ("train", "val"):
        shards = made.manifest.of_split(split)
        files = sorted(out.glob(f"tiny_{split}_*.bin"))
        heads = [np.fromfile(path, dtype=np.int32, count=256).tolist() for path in files]
        right = [[20240520, 1, shard.tokens, *[0] * 253] for shard in shards]
        whole = [path.stat().st_size for path in files] == [1024 + 2 * s.tokens for s in shards]
        same = [read(path) for path in files] == [read(made.folder / s.file) for s in shards]
        holds = heads == right and whole and same
        seen = f"{len(files)} files, {sum(s.tokens for s in shards):,} tokens"
        yield Claim(f"{split} shards by llm.c's rules, in a glob's order", holds, seen)
    yield compiled(place, out)


def compiled(place: Place, out: Path) -> Claim:
    """llm.c's loader itself, where there is a C compiler."""
    what = "llm.c's own dataloader.h reads them"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return Claim(what, True, "skipped: no C compiler here")
    source, program = place.llmc / "reader.c", place.folder / "reader"
    source.write_text(READER, encoding="utf-8")
    command = [compiler, "-w", "-O2", "-I", str(place.llmc), str(source), "-lm", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    pattern = str(out / "tiny_train_*.bin")
    told = subprocess.run([str(program), pattern], check=True, capture_output=True, text=True)
    *lines, total = told.stdout.splitlines()
    files = sorted(out.glob("tiny_train_*.bin"))
    tokens = [by_their_rules(path) for path in files]
    firsts = [each[:64].tolist() for each in tokens]
    wanted = [" ".join(map(str, [p, *first])) for p, first in zip(files, firsts, strict=True)]
    holds = lines == wanted and int(total) == sum(map(len, tokens))
    return Claim(what, holds, f"{len(lines)} shards, {int(total):,} tokens")


# ---------------------------------------------------------------- all


def read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def size(content: bytes) -> str:
    return f"{len(content):,} bytes"


def main() -> None:
    sys.path.insert(0, str(REPOSITORY))
    parser = argparse.ArgumentParser(description="Tokens in and out, with nanoGPT and llm.c.")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--llmc", type=Path, required=True, help="a checkout of llm.c")
    parser.add_argument("--peer-python", default=sys.executable, help="one with torch, tiktoken")
    arguments = parser.parse_args()
    claims: list[Claim] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), arguments)
        for part in (nanogpt_on_ours, we_on_theirs, llmc_on_ours):
            for claim in part(place):
                mark = "yes" if claim.holds else "NO"
                print(f"{mark:4} {claim.what:58} {claim.seen}", flush=True)
                claims.append(claim)
    print(json.dumps([asdict(claim) for claim in claims]))
    sys.exit(not all(claim.holds for claim in claims))


if __name__ == "__main__":
    main()
