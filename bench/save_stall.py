"""How long a save stops training at 124M parameters with both AdamW moments, beside a bare copy.

    python bench/save_stall.py [--saves 20] [--device cuda] [--folder .]

The bare copy moves the same bytes, in one piece, into memory that was touched before. The two take
turns. A save's own writing goes on in a thread; it is waited for before the next turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, middle

from tuppence import checkpoint
from tuppence.checkpoint import Pieces, Retention, Saver, State
from tuppence.folder import RunFolder

WIDTH, LAYERS, VOCAB, CONTEXT = 768, 12, 50257, 1024  # GPT-2 124M
BLOCK = {
    "ln_1.weight": (WIDTH,),
    "attn.c_attn.weight": (3 * WIDTH, WIDTH),
    "attn.c_attn.bias": (3 * WIDTH,),
    "attn.c_proj.weight": (WIDTH, WIDTH),
    "attn.c_proj.bias": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
    "mlp.c_fc.bias": (4 * WIDTH,),
    "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
    "mlp.c_proj.bias": (WIDTH,),
}


def pieces(device: str) -> tuple[Pieces, Pieces]:
    """Weights and moments, as a fused AdamW holds them."""
    shapes: dict[str, tuple[int, ...]] = {"wte": (VOCAB, WIDTH), "wpe": (CONTEXT, WIDTH)}
    shapes |= {f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    made = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    moments = {f"{n}.{k}": torch.rand_like(t) for n, t in made.items() for k in ("m", "v")}
    steps = {f"{name}.step": torch.zeros((), device=device) for name in made}
    return checkpoint.whole(made), checkpoint.whole(moments | steps)


def bare_copy(nbytes: int, device: str) -> Callable[[], None]:
    """A function that copies so many bytes, from the device, into memory that is there already."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    into = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device == "cuda")

    def copy() -> None:
        into.copy_(source, non_blocking=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return copy


def state(step: int) -> State:
    empty = {"int": 0, "float": 0.0, "bool": False, "str": ""}
    kinds = {
        name: getattr(f.type, "__name__", "") for name, f in State.__dataclass_fields__.items()
    }
    values = {n: () if k == "tuple" else empty.get(k) for n, k in kinds.items()}
    return State(**{**values, "step": step})  # type: ignore[arg-type]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--saves", type=int, default=20)
    words.add_argument("--device", default="cpu")
    words.add_argument("--folder", default=".")
    asked = words.parse_args()
    torch.set_num_threads(1)
    model, optimizer = pieces(asked.device)
    held = [*model.values(), *optimizer.values()]
    nbytes = sum(piece.tensor.nbytes for piece in held)
    copy = bare_copy(nbytes, asked.device)
    with tempfile.TemporaryDirectory(dir=asked.folder) as place:
        folder = RunFolder(Path(place))
        fence = checkpoint.claim(folder, 1)
        saver = Saver(folder, attempt=1, keep=Retention(1), fence=fence)
        saver.prepare(model, optimizer)
        saver.wait()
        copies, stalls, wholes = [], [], []
        for step in range(1, asked.saves + 1):
            copies.append(seconds(copy))
            stalls.append(saver.save(model, optimizer, state(step)))
            saver.wait()
            wholes.append(saver.seconds)
        saver.close()
        folder.close()
    gpu = f", {torch.cuda.get_device_name()}" if asked.device == "cuda" else ""
    print(f"{machine()}{gpu}: {nbytes / 1e9:.2f} GB in {len(held)} tensors, {asked.saves} saves")
    print(f"bare copy         {middle(copies, '.3f')} s")
    print(f"stall of a save   {middle(stalls, '.3f')} s")
    ratios = statistics.median(stalls) / statistics.median(copies), max(stalls) / max(copies)
    print(f"ratio             {ratios[0]:.2f} of the medians, {ratios[1]:.2f} of the largest")
    print(f"whole save        {middle(wholes, '.2f')} s, the rest of it beside training")


if __name__ == "__main__":
    main()
