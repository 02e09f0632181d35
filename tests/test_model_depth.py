"""The depth family against its description (tests/textbook.py), and as a whole."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from families import SMALL, built, model_plan, on_one_thread, shaken
from textbook import depth
from torch.utils.flop_counter import FlopCounterMode

from tuppence.model import layers
from tuppence.model.layers import cross_entropy, head_loss, norm, relu_squared, softcapped

PLAN = model_plan(**SMALL["depth"])
IDX = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(3))

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"n_kv_head": None, "window_pattern": None},
        {"n_kv_head": 1, "n_layer": 2, "window_pattern": "SSL"},
        {"value_embeddings": False, "n_layer": 4},
        {"residual_scalars": False},
        {"exportable": True, "window_pattern": None},
    ],
    ids=lambda keys: ",".join(f"{k}={v}" for k, v in keys.items()) or "all",
)
def test_logits_and_gradients_are_the_textbooks(keys: dict, how: str) -> None:
    plan = model_plan(**{**SMALL["depth"], **keys})
    model = shaken(plan, attention=how).double()
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits, targets = model(IDX), IDX.roll(-1, 1)
    expected = torch.stack([depth(weights, plan, row) for row in IDX])
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    assert expected.abs().max() > 10  # the cap bends them
    model(IDX, targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(p.grad, weights[name].grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("function", [norm, relu_squared])
def test_written_out_gradients_are_the_derivatives(function) -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(function, x.requires_grad_())


def test_a_norm_and_a_square_are_torchs_own() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (32,), eps=1e-6))
    assert torch.equal(relu_squared(x), F.relu(x) * F.relu(x))
    assert norm(torch.zeros(2, 32)).eq(0).all()
    near = norm(x.bfloat16())
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), norm(x), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_in_chunks_is_the_whole_ones(rows: int, reduction: str, monkeypatch) -> None:
    """Values and gradients, padding left out, whatever the number of rows that go at once."""
    monkeypatch.setattr(layers, "HEAD_CHUNK", {False: rows * 50, True: 0})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 32, generator=generator).requires_grad_()
    weight = (3 * torch.randn(50, 32, generator=generator)).requires_grad_()
    targets = IDX.clone()
    targets[1, 10:] = -1
    found = []
    for loss in (
        head_loss(x, weight, targets, reduction),
        cross_entropy(softcapped(x @ weight.T), targets, reduction),
    ):
        x.grad = weight.grad = None
        (3 * loss).backward()
        found.append((loss.detach(), x.grad, weight.grad))
    assert found[0][1][1, 10:].eq(0).all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_loss_without_gradients_does_not_compute_them() -> None:
    x, weight = torch.randn(2, 16, 32), torch.nn.Parameter(torch.randn(50, 32))

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            head_loss(x, weight, IDX, "sum")
        return counter.get_total_flops()

    with torch.no_grad():
        assert flops() == 2 * IDX.numel() * 32 * 50
    assert flops() == 3 * 2 * IDX.numel() * 32 * 50


# ---------------------------------------------------------------- as a whole


@pytest.mark.parametrize("vocab_size", [50, 1000])
def test_the_first_loss_is_that_of_a_uniform_guess(vocab_size: int) -> None:
    model = built(model_plan(vocab_size=vocab_size, **SMALL["depth"]))
    with torch.no_grad():
        first = model(IDX, IDX.roll(-1, 1)).item()
    assert first == pytest.approx(math.log(vocab_size), abs=0.01)


def test_both_attentions_agree() -> None:
    """Windows and shared keys included; values and gradients."""
    found = []
    for how in ("sdpa", "matmul"):
        model = shaken(PLAN, attention=how)
        loss = model(IDX, IDX.roll(-1, 1))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
def test_under_autocast_all_of_the_stream_is_bf16(how: str) -> None:
    model = shaken(PLAN, attention=how)
    model.lm_head.weight.data.mul_(0.1)
    kinds: list[torch.dtype] = []
    for block in model.h:
        for part in (block, block.attn, block.mlp):
            part.register_forward_hook(lambda _module, _args, out: kinds.append(out.dtype))
    runs = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(IDX)
            loss = model(IDX, IDX.roll(-1, 1))
        loss.backward()
        assert logits.dtype == loss.dtype == torch.float32
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        runs.append((logits, torch.cat([g.flatten() for g in grads])))
    half = len(kinds) // 2
    assert set(kinds[:half]) == {torch.float32}
    assert set(kinds[half:]) == {torch.bfloat16}
    (exact, grads), (near, near_grads) = runs
    assert not torch.equal(exact, near)
    assert (exact - near).norm() < 0.05 * exact.norm()
    assert F.cosine_similarity(grads, near_grads, 0) > 0.99


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
def test_no_token_sees_a_later_one(how: str) -> None:
    model = shaken(PLAN, attention=how)
    changed = IDX.clone()
    changed[:, 9] = (changed[:, 9] + 7) % 50
    with torch.no_grad():
        before, after = model(IDX), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9] != after[:, 9]).any()
    assert (before[:, 15] != after[:, 15]).any()  # by the whole window of the last layer


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
def test_windows_hide_what_is_beyond_them(how: str) -> None:
    """Three layers that look 3 back reach 9 back, through one another, and not further."""
    model = shaken(dataclasses.replace(PLAN, windows=(4, 4, 4)), attention=how)
    changed = IDX.clone()
    changed[:, 0] = (changed[:, 0] + 7) % 50
    with torch.no_grad():
        before, after = model(IDX), model(changed)
    differs = (before != after).any(-1).all(0)
    assert differs.tolist() == [True] * 10 + [False] * 6


@pytest.mark.parametrize("family", ["depth", "looped"])
def test_loss_ignores_padding_and_sums(family: str) -> None:
    model = shaken(model_plan(**SMALL[family]))
    targets = IDX.roll(-1, 1).clone()
    targets[1, 4:] = -1
    with torch.no_grad():
        total = model(IDX, targets, reduction="sum")
        each = model(IDX[:1], targets[:1], reduction="sum")
        each = each + model(IDX[1:, :4], targets[1:, :4], reduction="sum")
        mean = model(IDX, targets)
    torch.testing.assert_close(total, each)
    torch.testing.assert_close(mean, total / (16 + 4))


def test_it_is_as_long_as_it_was_planned() -> None:
    model = built(PLAN)
    with pytest.raises(AssertionError, match="17 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_logits_are_capped_alike_without_gradients(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place and in parts, the last of which is not full."""
    monkeypatch.setattr(layers, "HEAD_CHUNK", {False: 64})
    logits = 20 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(kind)
    expected = softcapped(logits)
    with torch.no_grad():
        assert torch.equal(softcapped(logits.clone()), expected)
    assert expected.dtype == torch.float32
    assert 10 < expected.abs().max() < 15
