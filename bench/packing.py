"""What attention within documents costs a step on this machine, and what it does to the loss.

    python bench/packing.py [--rounds 40] [--corpus FILE.jsonl[.xz] [--bytes 2000] [--seeds 3]
                            [--steps 150]]

Cost: whole steps of small models, plain and within documents, in turn; documents of about a fifth
of a window. Loss: the corpus's documents of at most --bytes bytes (short ones, so that windows hold
several), a small model trained on them both ways, for the same steps, on the same batches, for each
seed; the val split is judged as the model was trained. A seed's two runs are a pair.
"""

import argparse
import dataclasses
import json
import lzma
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import machine, middle, rows, tuppence

from tuppence.config import Data, DataPlan, Model, ModelPlan, OptimizerPlan, Run
from tuppence.model import build
from tuppence.model.replay import Draws
from tuppence.plan import laws
from tuppence.plan.asked import optimizer_of, solve_model, solve_optimizer
from tuppence.plan.shapes import shape_of
from tuppence.train.optim import optimizers_of
from tuppence.train.step import MicroBatch, train_step
from tuppence.workers import Workers

VOCAB, SEQUENCE, MICRO, ITERATIONS = 2048, 256, 4, 4
LOOP = {"n_prelude": 1, "n_recurrent": 2, "n_coda": 1, "mean_recurrence": 4, "max_recurrence": 8}
MODELS = {
    "gpt2": Model(family="gpt2", n_layer=4, n_head=3, n_embd=192, sequence_len=SEQUENCE),
    "depth": Model(family="depth", n_layer=4, n_head=3, n_embd=192, sequence_len=SEQUENCE),
    "looped": Model(family="looped", n_embd=192, n_head=3, sequence_len=SEQUENCE, **LOOP),
}
WAYS = [("fp32", "sdpa"), ("bf16", "matmul")]
TRAINED = [
    *("model.family=depth", "model.depth=none", "model.n_layer=3", "model.n_head=2"),
    *("model.n_embd=128", "model.sequence_len=512", "train.batch_tokens=4096"),
    *("data.tokenizer=bpe:2048", "train.eval_every=1000000", "train.sample_tokens=0"),
]


def solved(asked: Model) -> tuple[ModelPlan, OptimizerPlan]:
    """The plans of a small model and its optimizer."""
    run = Run(model=asked, data=Data(source="x", tokenizer="char"))
    fields = {f.name: None for f in dataclasses.fields(DataPlan)}
    known = {"vocab_size": VOCAB, "train_tokens": 10**7, "val_tokens": 10**5, "packing": "plain"}
    data = DataPlan(**{**fields, **known})  # type: ignore[arg-type]
    recipe = laws.recipe(shape_of(asked, VOCAB), optimizer_of(run), 1e7, batch_tokens=4096)
    model = solve_model(run, data)
    return model, solve_optimizer(run, model, laws.overridden(recipe, run.train))


def stepper(name: str, precision: str, attention: str, end: int | None) -> Callable[[], float]:
    """Takes a step each time it is called; its seconds of a core."""
    plan, optimizer = solved(MODELS[name])
    model = build(plan, attention=attention, document_end=end)
    model.init_weights(0)
    workers = Workers(model, count=1, device="cpu", precision=precision)
    optimizers = optimizers_of(model, optimizer, workers)
    tokens = torch.randint(1, VOCAB, (MICRO, SEQUENCE), generator=torch.Generator().manual_seed(0))
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 5 / SEQUENCE] = 0
    drawn = Draws(torch.arange(MICRO), ITERATIONS if plan.loop else None)
    batch = [MicroBatch(tokens, tokens.roll(-1, 1), drawn)]

    def step() -> float:
        started = time.process_time()  # the machine may have other things to do
        train_step(workers, optimizers, batch, factor=1e-3, grad_clip=1.0)
        return time.process_time() - started

    return step


def cost(rounds: int) -> None:
    """Prints a step's milliseconds both ways, and the median of the ratios within a round."""
    torch.set_num_threads(1)
    print("step of 4 x 256 tokens, one thread, CPU ms: median (least to most)")
    for name in MODELS:
        for precision, attention in WAYS:
            both = [stepper(name, precision, attention, end) for end in (None, 0)]
            taken = [[1e3 * step() for step in both] for _ in range(rounds + 5)][5:]
            plain, within = ([pair[i] for pair in taken] for i in (0, 1))
            ratio = statistics.median(b / a for a, b in taken)
            way = f"{name} {precision} {attention}"
            told = f"plain {middle(plain, '.1f')}  documents {middle(within, '.1f')}"
            print(f"  {way:22} {told}  ratio {ratio:.3f}")


def texts(corpus: Path, most: int) -> Iterator[str]:
    """The corpus's documents of at most so many bytes."""
    with lzma.open(corpus, "rt") if corpus.suffix == ".xz" else corpus.open() as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if len(text.encode()) <= most:
                yield text


def losses(corpus: Path, most: int, seeds: int, steps: int) -> None:
    """Trains pairs and prints their val losses and the mean difference."""
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place), []
        chosen = list(texts(corpus, most))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in chosen)
        (folder / "short.jsonl").write_text(lines)
        size = sum(len(text.encode()) for text in chosen) / len(chosen)
        print(f"{len(chosen):,} documents of {size:,.0f} bytes on average; {steps} steps of 4,096")
        for seed in range(seeds):
            pair = [trained(folder, packing, seed, steps) for packing in ("plain", "documents")]
            found.append(pair)
            print(f"  seed {seed}: plain {pair[0]:.4f}  documents {pair[1]:.4f} nats/token")
        apart = [within - plain for plain, within in found]
        spread = statistics.stdev(apart) if seeds > 1 else float("nan")
        print(f"documents - plain: {statistics.fmean(apart):+.4f} (sd over seeds {spread:.4f})")


def trained(folder: Path, packing: str, seed: int, steps: int) -> float:
    """The val loss of one run."""
    name = f"{packing}{seed}"
    words = [*TRAINED, f"budget.steps={steps}", f"train.seed={seed}", f"data.packing={packing}"]
    tuppence("run", "data.source=short.jsonl", f"name={name}", *words, folder=folder)
    return float(rows(folder / "runs" / name, "evals")[-1]["loss"])


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--rounds", type=int, default=40)
    words.add_argument("--corpus", type=Path)
    words.add_argument("--bytes", type=int, default=2000)
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--steps", type=int, default=150)
    asked = words.parse_args()
    print(machine())
    cost(asked.rounds)
    if asked.corpus:
        losses(asked.corpus, asked.bytes, asked.seeds, asked.steps)


if __name__ == "__main__":
    main()
