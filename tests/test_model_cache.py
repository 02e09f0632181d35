"""Cached passes give what one whole pass gives: token by token, in chunks, and when generating."""

import itertools

import pytest
import torch
from families import SMALL, model_plan, on_one_thread, shaken

from tuppence.config import ModelPlan
from tuppence.evals.generate import generate, window_start
from tuppence.model import Family
from tuppence.model.cache import Cache
from tuppence.workers import Workers

VARIANTS = {
    "gpt2": {},
    "gpt2 untied": {"tied_head": False, "bias": False},
    "depth": {},
    "depth exportable": {"exportable": True, "window_pattern": None},
    "depth one key head": {"n_kv_head": 1, "n_layer": 4, "window_pattern": "SSL"},
    "depth unshared": {"n_kv_head": 4, "residual_scalars": False},
    "looped": {},
    "looped bare": {"lora_rank": 0, "n_prelude": 0, "n_coda": 0},
    "looped routed": {"mixture_of_depths": True, "mean_recurrence": 4},
}
IDX = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(5))

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)


def plan_of(variant: str, **keys: object) -> ModelPlan:
    return model_plan(**{**SMALL[variant.split()[0]], **VARIANTS[variant], **keys})


def calm(plan: ModelPlan, *, how: str) -> Family:
    """Every parameter counts, and logits stay small enough to compare to 1e-5."""
    model = shaken(plan, attention=how)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    return model


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "chunks", [[1] * 16, [16], [5, 1, 7, 2, 1], [1, 15], [12, 4]], ids=lambda c: f"{c[:3]}"
)
def test_parts_give_what_the_whole_gives(variant: str, how: str, chunks: list[int]) -> None:
    model, cache = calm(plan_of(variant), how=how), Cache(16)
    with torch.no_grad():
        whole = model(IDX)
        parts = [model(part, cache=cache) for part in IDX.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)
    assert cache.length == 16
    assert whole.std() > 0.05
    assert whole.abs().max() < 14


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "looped routed"])
def test_a_batch_has_one_cache(variant: str) -> None:
    model, cache = calm(plan_of(variant), how="sdpa"), Cache(16)
    idx = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split([9, 1, 6], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=0)


def test_a_router_has_a_cache_for_one_sequence() -> None:
    """Sequences would keep different numbers of positions."""
    model = calm(plan_of("looped routed"), how="sdpa")
    with pytest.raises(AssertionError, match="one sequence a cache"):
        model(IDX.expand(2, 16), cache=Cache(16))


def test_a_router_keeps_only_what_it_takes() -> None:
    model, cache = calm(plan_of("looped routed"), how="sdpa"), Cache(16)
    with torch.no_grad():
        model(IDX, cache=cache)
    lengths = [cache.seen(layer) for layer in sorted(cache._layers)]
    assert lengths[:4] == [16] * 4  # prelude, coda and the first iteration take all
    assert min(lengths[4:]) < 16
    assert lengths[4::2] == lengths[5::2]  # the two blocks of an iteration


@pytest.mark.parametrize("family", SMALL)
def test_a_full_cache_is_an_error(family: str) -> None:
    """Of the cache, and of the model's own positions."""
    model = calm(plan_of(family), how="sdpa")
    with torch.no_grad():
        model(IDX[:, :4], cache=(cache := Cache(5)))
        with pytest.raises(AssertionError, match="a cache of 5 positions is full"):
            model(IDX[:, 4:6], cache=cache)
        model(IDX, cache=(cache := Cache(20)))
        with pytest.raises(AssertionError, match="17 positions"):
            model(IDX[:, :1], cache=cache)


def test_a_cache_in_parts() -> None:
    """Extend, rewind and repeat, by hand."""
    cache = Cache(8)
    k, v = (torch.randn(2, 1, 8, 3, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert cache.seen(7) == 0
    kept_k, kept_v = cache.extend(7, k[:, :, :5], v[:, :, :5])
    assert torch.equal(kept_k, k[:, :, :5])
    assert torch.equal(kept_v, v[:, :, :5])
    cache.rewind(7, 2)
    cache.rewind(99, 2)  # which has nothing
    assert (cache.seen(7), cache.seen(99)) == (3, 0)
    kept_k, _ = cache.extend(7, k[:, :, 5:], v[:, :, 5:])
    assert torch.equal(kept_k, torch.cat([k[:, :, :3], k[:, :, 5:]], 2))
    cache.repeat(2, 7, 3)
    assert cache.seen(2) == 3
    again_k, again_v = cache.extend(2, k[:, :, :1], v[:, :, :1])
    assert torch.equal(again_k, torch.cat([k[:, :, 5:], k[:, :, :1]], 2))
    assert torch.equal(again_v, torch.cat([v[:, :, 5:], v[:, :, :1]], 2))


# ---------------------------------------------------------------- generating


@pytest.mark.parametrize("variant", ["gpt2", "depth", "looped", "looped routed"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cached_generation_is_the_naive_one(variant: str, temperature: float) -> None:
    """Of ten prompts of every length, to the context's end and twice as far beyond."""
    model = shaken(plan_of(variant, sequence_len=8))
    workers = Workers(model, count=1, device="cpu", precision="fp32")
    generator = torch.Generator().manual_seed(7)
    said = set()
    for number in range(10):
        prompt = torch.randint(50, (1 + number,), generator=generator).tolist()
        ways = [
            generate(
                workers,
                prompt,
                new_tokens=22,
                context=8,
                temperature=temperature,
                top_k=10,
                seed=number,
                cached=cached,
            )
            for cached in (True, False)
        ]
        assert ways[0] == ways[1]
        assert ways[0][: len(prompt)] == prompt
        assert len(ways[0]) == len(prompt) + 22
        said.add(tuple(ways[0][len(prompt) :]))
    assert len(said) > 5


def test_the_window_slides_by_quarters() -> None:
    """A window never has more tokens than the context, and once full never fewer than three
    quarters of it; it stands still while a quarter fills."""
    for context in (1, 2, 3, 4, 16, 100):
        quarter = max(1, context // 4)
        starts = [window_start(length, context) for length in range(1, 5 * context)]
        assert starts[:context] == [0] * context
        for length, start in enumerate(starts, start=1):
            assert length - start <= context
            assert start % quarter == 0
            if length > context:
                assert length - start > context - quarter
        steps = {b - a for a, b in itertools.pairwise(starts)}
        assert steps <= {0, quarter}


def test_beyond_the_context_it_computes_the_window_and_no_more(monkeypatch) -> None:
    """How many tokens each pass is given: one, but for the prompt and the starts of windows."""
    model = shaken(plan_of("depth"))
    given, forward = [], type(model).forward

    def counting(self, idx_BT, *args, **kwargs):
        given.append(idx_BT.shape[1])
        return forward(self, idx_BT, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counting)
    workers = Workers(model, count=1, device="cpu", precision="fp32")
    generate(workers, [1, 2, 3], new_tokens=22, context=16, temperature=0)
    assert given == [3, *[1] * 13, 13, 1, 1, 1, 13, 1, 1, 1]
