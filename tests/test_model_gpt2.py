"""The gpt2 family against trained weights with known activations, and against transformers."""

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import built, model_plan

from tuppence.model.replay import Draws, Dropout, hash32

WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "weights"

SMALL = model_plan(n_layer=2, bias=True)


def decoded(entry: dict) -> torch.Tensor:
    """A tensor of the llm-viz files: base64 of little-endian float32."""
    raw = np.frombuffer(base64.b64decode(entry["data"]), dtype="<f4").reshape(entry["shape"])
    return torch.from_numpy(raw.copy())


@pytest.fixture(scope="module")
def sorter() -> tuple[dict, dict]:
    if not WEIGHTS.exists():
        pytest.skip(f"the trained sorting model is not at {WEIGHTS}")
    texts = ("gpt-nano-sort-model.json", "gpt-nano-sort-t0-partials.json")
    model, partials = (json.loads((WEIGHTS / name).read_text()) for name in texts)
    return model, partials


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
def test_trained_weights_give_their_published_activations(sorter, attention) -> None:
    weights, partials = sorter
    config = weights["config"]
    plan = dataclasses.replace(
        SMALL,
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=config["n_embd"],
        vocab_size=config["vocab_size"],
        sequence_len=config["block_size"],
        tied_head=False,
    )
    model = built(plan, attention=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = "lm_head.weight" if name == "lm_head.weight" else f"transformer.{name}"
            parameter.copy_(decoded(weights[stored]))
    blocks: list[torch.Tensor] = []
    for block in model.h:
        block.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    with torch.no_grad():
        logits = model(decoded(partials["idx"]).long())
    assert len(blocks) == config["n_layer"]
    for i, output in enumerate(blocks):
        torch.testing.assert_close(output, decoded(partials[f"block{i}"]), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(logits, decoded(partials["lm_head"]), atol=2e-4, rtol=1e-3)


def test_logits_equal_transformers_at_124m() -> None:
    transformers = pytest.importorskip("transformers", reason="[dev] installs transformers")
    plan = dataclasses.replace(
        SMALL, n_layer=12, n_head=12, n_embd=768, vocab_size=50257, sequence_len=1024
    )
    model = built(plan, seed=3)
    with torch.no_grad():  # biases and norms away from their starting values, so that they count
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="eager"))
    state = {}
    for name, parameter in model.named_parameters():
        conv = name.endswith("weight") and (".c_" in name)  # stored transposed there
        state[f"transformer.{name}"] = parameter.detach().T if conv else parameter.detach()
    state["lm_head.weight"] = model.wte.weight.detach()
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("attn.bias")]
    idx = torch.randint(50257, (1, 128), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = model(idx), peer.eval()(idx).logits
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("bias", [True, False])
def test_both_attentions_agree(bias: bool) -> None:
    plan = dataclasses.replace(SMALL, bias=bias)
    idx = torch.arange(32).view(2, 16) % 50
    grads = []
    for attention in ("sdpa", "matmul"):
        model = built(plan, attention=attention, seed=5)
        loss = model(idx, idx.roll(-1, 1))
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_attention_is_causal() -> None:
    model = built(SMALL)
    idx = torch.zeros(1, 16, dtype=torch.long)
    changed = idx.clone()
    changed[0, 9] = 7
    with torch.no_grad():
        before, after = model(idx), model(changed)
    assert torch.equal(before[0, :9], after[0, :9])
    assert not torch.allclose(before[0, 9:], after[0, 9:])


def test_loss_ignores_padding_and_sums() -> None:
    model = built(SMALL)
    idx = torch.arange(32).view(2, 16) % 50
    targets = idx.roll(-1, 1).clone()
    targets[1, 4:] = -1
    with torch.no_grad():
        total = model(idx, targets, reduction="sum")
        each = model(idx[:1], targets[:1], reduction="sum")
        each = each + model(idx[1:, :4], targets[1:, :4], reduction="sum")
    torch.testing.assert_close(total, each)


def test_init_is_a_function_of_the_seed_with_the_published_spread() -> None:
    plan = dataclasses.replace(SMALL, n_embd=128, n_layer=8, vocab_size=500)
    one, same, other = built(plan, seed=1), built(plan, seed=1), built(plan, seed=2)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.wte.weight, other.wte.weight)
    assert one.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    spread = one.h[0].mlp.c_proj.weight.std().item()
    assert spread == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 x 8) = 4
    assert one.h[0].ln_1.weight.eq(1).all()
    assert one.h[0].attn.c_attn.bias.eq(0).all()


def test_untrained_loss_is_that_of_a_uniform_guess() -> None:
    model = built(dataclasses.replace(SMALL, vocab_size=65))
    idx = torch.randint(65, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(idx, idx.roll(-1, 1)).item() == pytest.approx(np.log(65), abs=0.1)


def test_dropout_belongs_to_the_sequence_not_to_the_batch() -> None:
    plan = dataclasses.replace(SMALL, dropout=0.3)
    model = built(plan)
    idx = torch.arange(64).view(4, 16) % 50
    key = torch.tensor([11, 22, 33, 44])
    with torch.no_grad():
        whole = model(idx, draws=Draws(key))
        first, second = Draws(key[:1]), Draws(key[1:])
        parts = torch.cat([model(idx[:1], draws=first), model(idx[1:], draws=second)])
        other = model(idx, draws=Draws(key + 1))
        off = model(idx)
    torch.testing.assert_close(whole, parts)
    assert not torch.allclose(whole, other)
    assert torch.equal(off, model(idx).detach())
    assert not torch.allclose(whole, off)


def test_dropout_drops_its_rate_and_keeps_the_mean() -> None:
    key = torch.arange(64) * 7919
    dropped = Dropout(0.2, key)(torch.ones(64, 4096))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    two = Dropout(0.2, key)
    first, second = two(torch.ones(64, 4096)), two(torch.ones(64, 4096))
    both = ((first == 0) & (second == 0)).float().mean().item()
    assert both == pytest.approx(0.04, abs=0.005)  # sites are independent
    neighbours = ((first[:-1] == 0) & (first[1:] == 0)).float().mean().item()
    assert neighbours == pytest.approx(0.04, abs=0.005)  # and so are sequences


def test_hash_is_a_bijection_on_a_range() -> None:
    values = hash32(torch.arange(1 << 16))
    assert values.unique().numel() == 1 << 16
    assert values.min() >= 0
    assert values.max() < 2**32
