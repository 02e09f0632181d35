"""Our answers beside lm-evaluation-harness's own, item by item, on one model of transformers.

    python bench/harness.py MODEL --core CORE_FOLDER --hellaswag hellaswag_val.jsonl
    python bench/harness.py random ...             a fresh GPT-2 of 124M parameters

Two comparisons, in fp32 on this machine's cores:
  choices   of CORE's multiple choice and llm.c's HellaSwag: ours, and those of prompts rendered
            apart and scored by the harness's HFLM
  adapter   tasks of the harness itself (ARC-easy, PIQA, HellaSwag, a text's log-likelihood, a text
            continued): through our passes, and through HFLM; with what SmolLM2-135M-Instruct is
            published with
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness_peer as peer
import torch
from common import machine

from tuppence import host
from tuppence.evals import bundle, core, foreign, harness, hellaswag, score
from tuppence.evals.subject import Subject

TASKS = ("openbook_qa", "hellaswag_zeroshot", "copa", "piqa", "arc_easy")
PUBLISHED = {"arc_easy": 54.12, "piqa": 66.92, "hellaswag": 42.99}  # SmolLM2-135M-Instruct's


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("model", help="a folder, a .gguf file, a name on the Hub, or random")
    asked.add_argument("--core", type=Path, required=True, help="the unpacked bundle")
    asked.add_argument("--hellaswag", type=Path, required=True)
    asked.add_argument("--tasks", default=",".join(TASKS))
    asked.add_argument("--items", type=int, default=200)
    asked.add_argument("--adapter-items", type=int, default=100)
    asked.add_argument("--batch", type=int, default=8, help="HFLM's")
    asked.add_argument("--only", choices=["choices", "adapter"])
    args = asked.parse_args()
    cores = host.usable_cores()
    host.settle_threads(cores)
    torch.set_num_threads(cores)
    print(machine())
    with tempfile.TemporaryDirectory() as place:
        source = _random(Path(place) / "random") if args.model == "random" else args.model
        lm = _hflm(source, batch=args.batch)
        subject = foreign.of_transformers(
            source, precision="fp32", device="cpu", cores=cores, say=print
        )
        if args.only != "adapter":
            _choices(subject, lm, args)
        if args.only != "choices":
            _adapter(subject, lm, args, Path(place))


def _random(folder: Path) -> str:
    """GPT-2 124M as it is before training, with GPT-2's tokens."""
    import transformers

    from tuppence.tokenizer.spec import build_tokenizer

    torch.manual_seed(0)
    ends = {"bos_token_id": 50256, "eos_token_id": 50256}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**ends)).save_pretrained(folder)
    build_tokenizer("gpt2", texts=lambda: iter(())).save(folder)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return str(folder)


def _hflm(source: str, *, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    path = Path(source)
    words = {"device": "cpu", "dtype": "float32", "batch_size": batch}
    if path.is_file():
        return HFLM(str(path.parent), gguf_file=path.name, **words)
    return HFLM(source, **words)


# ---------------------------------------------------------------- choices


def _choices(subject: Subject, lm: Any, args: argparse.Namespace) -> None:
    print(
        f"{'choices':24}{'items':>6}{'equal':>7}{'ties':>6}{'nats apart':>12}"
        f"{'ours':>9}{'HFLM':>9}{'times':>7}"
    )
    text = subject.text
    told = bundle.core_bundle(str(args.core), say=print)
    made = core.tasks(told, text, context=subject.context, max_per_task=args.items)
    by_label = {task.label: task for task in made}
    for label in filter(None, args.tasks.split(",")):
        score_theirs = functools.partial(peer.core, lm, args.core, label, args.items)
        _beside(label, subject, by_label[label], score_theirs)
    rows = bundle.hellaswag_rows(str(args.hellaswag), say=print)
    (task,) = hellaswag.tasks(rows, text, max_items=args.items)
    _beside(
        "hellaswag",
        subject,
        task,
        functools.partial(peer.hellaswag, lm, args.hellaswag, args.items),
    )


def _beside(label: str, subject: Subject, task: Any, theirs: Any) -> None:
    """A line: how many choices are equal, and the largest difference of a choice's mean nats."""
    began = time.perf_counter()
    asked = [(n, task.asks(n)) for n in range(task.count)]
    found = dict(score.answers(subject, asked))
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    scored = theirs()
    theirs_seconds = time.perf_counter() - began
    equal, ties, apart = 0, 0, 0.0
    for n, other in enumerate(scored):
        judged, answers = task.judge(n, found[n]), found[n]
        chosen, line = judged["choice"], other.choice
        if "choice_norm" in judged:  # HellaSwag's: by sum, and by mean
            same = (chosen, judged["choice_norm"]) == (other.choice_by_sum, line)
            tie = peer.tied(other.sums) or peer.tied(other.means)
        else:
            same, tie = chosen == line, peer.tied(other.means)
        equal += same
        ties += tie and not same
        for answer, mean in zip(answers, other.means, strict=True):
            if answer.tokens:
                apart = max(apart, abs(answer.nats / answer.tokens - mean))
    print(
        f"{label:24}{len(scored):>6}{equal:>7}{ties:>6}{apart:>12.1e}"
        f"{seconds:>8.1f}s{theirs_seconds:>8.1f}s{theirs_seconds / seconds:>6.1f}x",
        flush=True,
    )


# ---------------------------------------------------------------- adapter


CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{text}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "choices"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
{more}metadata: {{version: 1.0}}
"""
WHOLE = """task: whole
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{query}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
metadata: {{version: 1.0}}
"""
WRITTEN = """task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_case: true}}]
metadata: {{version: 1.0}}
"""


def _tasks(folder: Path, args: argparse.Namespace) -> None:
    """The harness's own tasks over local files: what it would have downloaded is here already."""
    data = args.core / "eval_data"
    easy = data / "world_knowledge" / "arc_easy.jsonl"
    piqa = data / "commonsense_reasoning" / "piqa.jsonl"
    with (
        lzma.open(args.hellaswag, "rt")
        if args.hellaswag.suffix == ".xz"
        else (args.hellaswag.open()) as file
    ):
        rows = file.read()
    (folder / "hellaswag.jsonl").write_text(rows)
    (folder / "utils.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    own = "process_docs: !function utils.process_docs\n"
    query = "{{query}}\\nAnswer:"
    texts = {
        "arc_easy": CHOICE.format(name="our_arc_easy", file=easy, text=query, more=""),
        "piqa": CHOICE.format(name="our_piqa", file=piqa, text=query, more=""),
        "hellaswag": CHOICE.format(
            name="our_hellaswag", file=folder / "hellaswag.jsonl", text="{{query}}", more=own
        ),
        "whole": WHOLE.format(file=piqa),
        "written": WRITTEN.format(file=easy),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def _adapter(subject: Subject, lm: Any, args: argparse.Namespace, place: Path) -> None:
    lm_eval = harness.library()
    folder = place / "tasks"
    folder.mkdir()
    os.environ.setdefault("HF_DATASETS_CACHE", str(place / "datasets"))
    _tasks(folder, args)
    print(f"{'adapter':16}{'items':>6}{'equal':>7}{'apart':>10}{'ours':>9}{'HFLM':>9}{'times':>7}")
    for name in ("our_arc_easy", "our_piqa", "our_hellaswag", "whole", "written"):
        found, seconds = [], []
        for model in (harness.Asked(subject), lm):
            loaded = harness.load([name], include=str(folder))
            began = time.perf_counter()
            found.append(
                lm_eval.evaluate(
                    model, loaded, limit=args.adapter_items, bootstrap_iters=0, log_samples=True
                )
            )
            seconds.append(time.perf_counter() - began)
        _compare(name, *found, *seconds)


def _compare(name: str, ours: Any, theirs: Any, seconds: float, their_seconds: float) -> None:
    """A line: requests whose answers are equal (choices, texts), and how far numbers are apart."""
    pairs = list(zip(ours["samples"][name], theirs["samples"][name], strict=True))
    apart, equal = 0.0, 0
    for mine, other in pairs:
        assert mine["doc_hash"] == other["doc_hash"]
        a, b = ([r[0] for r in each["resps"]] for each in (mine, other))
        if isinstance(a[0], str):
            equal += a == b
            continue
        values = [[x[0] if isinstance(x, tuple) else x for x in each] for each in (a, b)]
        apart = max([apart, *(abs(x - y) for x, y in zip(*values, strict=True))])
        best = [each.index(max(each)) for each in values]
        equal += best[0] == best[1] and [r[1:] for r in a if isinstance(r, tuple)] == [
            r[1:] for r in b if isinstance(r, tuple)
        ]
    told = {
        key.split(",")[0]: value
        for key, value in ours["results"][name].items()
        if "," in key and isinstance(value, float) and not key.startswith("alias")
    }
    shown = ", ".join(f"{key} {value:.4f}" for key, value in told.items())
    published = PUBLISHED.get(name.removeprefix("our_"))
    print(
        f"{name:16}{len(pairs):>6}{equal:>7}{apart:>10.1e}{seconds:>8.1f}s{their_seconds:>8.1f}s"
        f"{their_seconds / seconds:>6.1f}x  {shown}"
        + (f" (SmolLM2-135M-Instruct is published with {published})" if published else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
