"""Prints the val loss of a nanoGPT checkpoint, by its own model, in our evaluation's windows."""

import sys
import tempfile
from pathlib import Path

import torch

from tuppence.data.loader import val_windows
from tuppence.data.prepare import prepare


def main() -> None:
    peer = Path(sys.argv[1])
    sys.path.insert(0, str(peer))
    from model import GPT, GPTConfig  # the peer's own

    saved = torch.load(peer / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    with tempfile.TemporaryDirectory() as root:
        folder = prepare(source="shakespeare", tokenizer="char", root=Path(root)).folder
        nats, tokens = 0.0, 0
        for inputs, targets in val_windows(folder, sequence_len=64).batches(64):
            counted = int((targets >= 0).sum())
            with torch.no_grad():
                _, loss = model(torch.from_numpy(inputs), torch.from_numpy(targets))
            nats, tokens = nats + loss.item() * counted, tokens + counted
    sys.stderr.write(f"{tokens:,} tokens\n")
    print(nats / tokens)


if __name__ == "__main__":
    main()
