"""Preparation as others do it: nanoGPT's two data scripts and llm.c's fineweb.py.

They are the person's own checkouts, run as they are except for what follows from the corpus and the
machine: `load_dataset` gives the local file, the ranks come from our package instead of the
network, and they use as many processes as there are cores (nanoGPT's `num_proc`; llm.c leaves two
cores free, which on two cores would be one process). nanoGPT's `total_batches` is 1, because a
corpus of fewer than 1,024 documents breaks it; llm.c's Llama tokenizer, which it imports and does
not use for GPT-2, may be missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from prepare_runs import Measured, cores, run

# Runs a script of a checkout with a local corpus in the place of the download.
DRIVER = """
import base64, glob, json, os, runpy, sys, time, types
import datasets, tiktoken
script, corpus, ranks_path, cache = sys.argv[1:]
sys.argv = [script]
sys.path.insert(0, os.path.dirname(script))
try:
    import transformers
except ImportError:
    sys.modules["transformers"] = types.SimpleNamespace(  # `datasets` asks for the second
        AutoTokenizer=None, PreTrainedTokenizerBase=type("PreTrainedTokenizerBase", (), {}))
real_load = datasets.load_dataset
ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, open(ranks_path, "rb"))}
pattern = sys.stdin.read()
encoding = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256})
tiktoken.get_encoding = lambda name: encoding
began = [0.0]
def load_dataset(*args, split=None, **kwargs):
    local = real_load("json", data_files={"train": corpus}, cache_dir=cache)
    local = local.select_columns(["text"])
    began[0] = time.perf_counter()
    return local[split] if split else local
datasets.load_dataset = load_dataset
done = runpy.run_path(script, run_name="__main__")
seconds = time.perf_counter() - began[0]
if "tokenized" in done:  # nanoGPT
    tokens = sum(int(sum(split["len"])) for split in done["tokenized"].values())
else:
    shards = glob.glob(os.path.join(os.path.dirname(script), "fineweb10B", "*.bin"))
    tokens = sum((os.path.getsize(shard) - 1024) // 2 for shard in shards)
print(json.dumps({"seconds": seconds, "tokens": tokens}))
"""


def nanogpt_openwebtext(checkout: Path, corpus: Path, python: str) -> Measured:
    script = (checkout / "data/openwebtext/prepare.py").read_text(encoding="utf-8")
    script = _replaced(script, "num_proc = 8", f"num_proc = {cores()}")
    script = _replaced(script, "total_batches = 1024", "total_batches = 1")
    return _driven({"prepare.py": script}, corpus, python)


def llmc_fineweb(checkout: Path, corpus: Path, python: str) -> Measured:
    folder = checkout / "dev/data"
    script = (folder / "fineweb.py").read_text(encoding="utf-8")
    script = _replaced(script, "max(1, os.cpu_count() - 2)", str(cores()))
    common = (folder / "data_common.py").read_text(encoding="utf-8")
    return _driven({"fineweb.py": script, "data_common.py": common}, corpus, python)


def nanogpt_char(checkout: Path, text: Path, python: str) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(checkout / "data/shakespeare_char/prepare.py", folder)
        shutil.copy(text, Path(folder) / "input.txt")
        ran = run([python, str(Path(folder) / "prepare.py")])
        made = sum((Path(folder) / name).stat().st_size // 2 for name in ("train.bin", "val.bin"))
    return Measured(ran.seconds, made, ran.largest_mib)


def can_run(python: str) -> bool:
    """Whether this Python has what the peers import."""
    command = [python, "-c", "import datasets, requests, tqdm, tiktoken"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _driven(scripts: dict[str, str], corpus: Path, python: str) -> Measured:
    """The first of the scripts, in a folder of its own."""
    from tuppence.files import asset
    from tuppence.tokenizer.ranks import GPT2

    with tempfile.TemporaryDirectory() as folder:
        for name, content in ({"driver.py": DRIVER} | scripts).items():
            (Path(folder) / name).write_text(content, encoding="utf-8")
        script = Path(folder) / next(iter(scripts))
        driver, ranks = Path(folder) / "driver.py", asset(GPT2.file)
        offline = {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        ran = run(
            [python, str(driver), str(script), str(corpus.resolve()), str(ranks), folder],
            stdin=GPT2.split.regex,
            env=os.environ | offline,
        )
    made = json.loads(ran.line)
    return Measured(ran.seconds, made["tokens"], ran.largest_mib, core_seconds=made["seconds"])


def _replaced(script: str, old: str, new: str) -> str:
    if old not in script:
        raise SystemExit(f"the peer's script has no {old!r}; another version than is known here")
    return script.replace(old, new)
