"""Attention within documents: a packed window is its documents, each alone where it stands."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, model_plan, on_one_thread, shaken
from gloo import start
from small_runs import DEPTH, LOOPED, finished
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tuppence import checkpoint, cli, host
from tuppence.config import DataPlan, ModelPlan
from tuppence.data.loader import val_windows
from tuppence.data.prepare import prepare
from tuppence.errors import UserError
from tuppence.evals.loss import val_loss
from tuppence.model import Family, build, documents, looped
from tuppence.model.cache import Cache
from tuppence.model.documents import Documents, Spans, block_mask, dense_mask, document_end
from tuppence.model.layers import causal_mask
from tuppence.model.replay import Draws
from tuppence.plan.hardware import Calibration
from tuppence.ranks import join
from tuppence.train.parallel import Parallel, recompute
from tuppence.workers import Workers

one_thread = pytest.fixture(autouse=True, scope="module")(on_one_thread)

END = 49
VARIANTS = {
    "gpt2": {"tied_head": False},
    "depth": {},
    "depth one key head": {"n_kv_head": 1, "n_layer": 4, "window_pattern": "SSL"},
    "looped": {},
    "looped routed": {"mixture_of_depths": True, "mean_recurrence": 4},
}
# Of each window: one that begins inside a document and ends inside another, with empty ones in
# between; one without an end; ends at the very first and at the last place.
LENGTHS = [[5, 1, 1, 6, 3], [16], [1, 8, 7]]
ENDED = [[1, 1, 1, 1, 0], [0], [1, 1, 1]]
DOCS = torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in LENGTHS])
KEYS = torch.tensor([11, 22, 33])


def packed() -> Tensor:
    idx = torch.randint(END, (3, 16), generator=torch.Generator().manual_seed(3))
    for row, lengths, ended in zip(idx, LENGTHS, ENDED, strict=True):
        for last, end in zip(torch.tensor(lengths).cumsum(0) - 1, ended, strict=True):
            row[last] = END if end else row[last]
    return idx


IDX = packed()
TARGETS = IDX.roll(-1, 1)


def plan_of(variant: str, **keys: object) -> ModelPlan:
    return model_plan(**{**SMALL[variant.split()[0]], **VARIANTS[variant], **keys})


def model_of(plan: ModelPlan, how: str = "sdpa", *, end: int | None = END) -> Family:
    """Every parameter counts, and logits stay small enough to compare to 1e-5."""
    model = build(plan, attention=how, document_end=end)
    model.load_state_dict(shaken(plan).state_dict())
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    return model


def alone(plain: Family, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """A model without documents, called at other positions than the first."""
    normal = looped.keyed_normal

    def at(first: int, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        def shifted(key: Tensor, start: int, positions: int, channels: int) -> Tensor:
            return normal(key, start + first, positions, channels)

        monkeypatch.setattr(looped, "keyed_normal", shifted)
        tables = {name: p.roll(-first, 0) for name, p in plain.named_parameters() if "wpe" in name}
        tables |= {n: b.roll(-first, 1) for n, b in plain.named_buffers() if n == "rotary"}
        out = functional_call(plain, tables, (idx, targets), {"reduction": "sum"})
        monkeypatch.setattr(looped, "keyed_normal", normal)
        return out

    return at


def each_document() -> list[tuple[int, slice]]:
    """(row, positions)."""
    ends = [torch.tensor(row).cumsum(0).tolist() for row in LENGTHS]
    return [
        (row, slice(end - n, end))
        for row, lengths in enumerate(LENGTHS)
        for n, end in zip(lengths, ends[row], strict=True)
    ]


def test_a_document_ends_with_its_end_of_text() -> None:
    assert Documents(END, 0, False, None).of(IDX).tolist() == DOCS.tolist()
    assert (IDX == END).sum().item() == 7
    assert IDX[2, 0] == IDX[2, -1] == END


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_window_is_its_documents_alone(
    variant: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients."""
    plan = plan_of(variant)
    model, plain = model_of(plan, how), model_of(plan, how, end=None)
    at = alone(plain, monkeypatch)
    logits = model(IDX)
    for row, place in each_document():
        found = at(place.start, IDX[row : row + 1, place])[0]
        torch.testing.assert_close(logits[row, place], found, atol=1e-5, rtol=0)
    assert logits.std() > 0.05
    assert (logits - plain(IDX))[0, 8:].abs().max() > 0.1
    model(IDX, TARGETS, reduction="sum").backward()
    sum(
        at(place.start, IDX[row : row + 1, place], TARGETS[row : row + 1, place])
        for row, place in each_document()
    ).backward()
    for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        size = other.grad.abs().max().item()
        assert size > 0, name
        torch.testing.assert_close(p.grad, other.grad, atol=1e-5 * size, rtol=0, msg=name)


@pytest.mark.parametrize("variant", ["depth", "looped"])
def test_where_positions_turn_a_document_may_stand_anywhere(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise aside, which a looped model has at each position."""
    model = model_of(plan_of(variant))
    moved = IDX[:1].roll(4, 1)
    moved[0, 3] = END
    monkeypatch.setattr(looped, "STATE_STD", 0.0)
    with torch.no_grad():
        here, there = model(IDX[:1]), model(moved)
    torch.testing.assert_close(there[0, 11:], here[0, 7:12], atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_another_document(variant: str, how: str) -> None:
    model = model_of(plan_of(variant), how)
    changed = IDX.clone()
    changed[0, 7:9] = (changed[0, 7:9] + 7) % END  # the first two of the fourth document
    with torch.no_grad():
        before, after = model(IDX), model(changed)
    differs = (before - after).abs().amax(-1)
    assert differs[0, 7:13].min() > 1e-3
    differs[0, 7:13] = 0
    assert differs.max() <= (1e-6 if variant == "looped routed" else 0)


DRAWN = {
    "gpt2": {"dropout": 0.2},
    "depth": {},
    "looped": {"backprop_depth": 2},
    "looped routed": {},
}


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize("variant", DRAWN)
def test_in_training_no_gradient_reaches_another_document(variant: str, how: str) -> None:
    """With dropout, noise, drawn iterations and picked tokens."""
    model = model_of(plan_of(variant, **DRAWN[variant]), how)
    entered: list[Tensor] = []
    model.wte.register_forward_hook(lambda _module, _args, out: entered.append(out))
    draws = Draws(KEYS, 4 if variant.startswith("looped") else None)
    targets = torch.full_like(TARGETS, -1)
    targets[0, 7:13] = TARGETS[0, 7:13]
    loss = model(IDX, targets, draws=draws)
    (reached,) = torch.autograd.grad(loss, entered)
    reached = reached.abs().amax(-1)
    assert reached[0, 7:13].min() > 0
    reached[0, 7:13] = 0
    assert reached.max() == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_position_and_no_document_at_all(variant: str) -> None:
    """A window of one; one whose every token is an end; one without any is a plain one."""
    plan = plan_of(variant)
    model, plain = model_of(plan), model_of(plan, end=None)
    ends = torch.full((1, 16), END)
    with torch.no_grad():
        for one in (IDX[:, :1], ends[:, :1]):
            assert torch.equal(model(one), plain(one))
        torch.testing.assert_close(model(IDX[1:2]), plain(IDX[1:2]), atol=1e-5, rtol=0)
        said = model(ends)
    if not variant.startswith("depth"):  # positions and noise differ
        return
    torch.testing.assert_close(said, said[:, :1].expand_as(said), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_generated_is_one_document(variant: str) -> None:
    """Ends in it included: a cache is the plain model's."""
    plan = plan_of(variant)
    model, plain = model_of(plan), model_of(plan, end=None)
    found = []
    with torch.no_grad():
        for one in (model, plain):
            cache = Cache(16)
            found.append([one(part, cache=cache) for part in IDX[:1].split([9, 1, 6], 1)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_documents_need_an_end(data_plan: DataPlan) -> None:
    asked = dataclasses.replace(data_plan, packing="documents")
    assert document_end(data_plan, None) is None
    assert document_end(data_plan, 7) is None
    assert document_end(asked, 0) == 0
    with pytest.raises(UserError, match=r"tokenizer char has no end-of-text.*data\.packing=plain"):
        document_end(asked, None)


# ---------------------------------------------------------------- what a card does


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every model compute in one of the ways of a card; FlexAttention is interpreted."""
    torch.compiler.reset()
    interpreted = torch.compile(flex_attention, backend="eager", fullgraph=True)
    monkeypatch.setattr(documents, "_compiled", lambda: interpreted)

    def taken(name: str) -> None:
        monkeypatch.setattr(Documents, "way", lambda self, device: name)

    return taken


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ways_of_a_card_are_that_of_a_cpu(variant: str, way: Callable[[str], None]) -> None:
    plan = plan_of(variant)
    model = model_of(plan)
    found: dict[str, list[Tensor]] = {}
    for name in ("mask", "split"):
        way(name)
        model.zero_grad()
        loss = model(IDX, TARGETS)
        loss.backward()
        found[name] = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        expected = model(IDX)
        way("flex")
        torch.testing.assert_close(model(IDX), expected, atol=1e-5, rtol=0)


def test_probabilities_that_are_dropped_are_written_out(way: Callable[[str], None]) -> None:
    """On a card too; and one position needs no mask anywhere."""
    model = model_of(plan_of("gpt2", dropout=0.2))
    draws = Draws(KEYS)
    expected = model(IDX, TARGETS, draws=draws)
    way("flex")
    assert torch.equal(model(IDX, TARGETS, draws=draws), expected)
    assert model.documents.mask(IDX[:, :1], model.mask, torch.float32) is None


RISING = torch.tensor([[0] * 100 + [1] * 3 + [2] * 200 + [3] * 97, [0] * 400, [*range(400)]]).int()
ANY = torch.randint(3, (2, 400), generator=torch.Generator().manual_seed(0)).sort(1).values.int()
PICKED = torch.cat([ANY[:, 50:], ANY[:, :50]], 1)  # what fills up begins again


@pytest.mark.parametrize("docs", [RISING, PICKED], ids=["rising", "picked"])
@pytest.mark.parametrize("length", [7, 128, 384, 400])
@pytest.mark.parametrize("window", [1, 50, 130, 260, 400])
def test_blocks_are_told_without_looking_at_pairs(docs: Tensor, length: int, window: int) -> None:
    """They are torch's, which looks at every pair, but for blocks that only seem to meet: where
    numbers rise there are none."""
    docs = docs[:, :length].contiguous()

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (docs[b, q] == docs[b, k]) & (q >= k) & (q - k < window)

    ours = block_mask(docs, window)
    torchs = create_block_mask(seen, len(docs), None, length, length, device="cpu")
    full = torchs.full_kv_num_blocks
    assert torch.equal(ours.full_kv_num_blocks, full)
    for row in range(ours.full_kv_indices.shape[2]):
        for b in range(len(docs)):
            count = int(full[b, 0, row])
            chosen = [m.full_kv_indices[b, 0, row, :count].tolist() for m in (ours, torchs)]
            assert sorted(chosen[0]) == sorted(chosen[1])
    visible, needed = ours.to_dense().bool(), torchs.to_dense().bool()
    assert visible[needed].all()
    if docs is not PICKED and (docs.diff(dim=1) >= 0).all():
        assert torch.equal(visible, needed)


@pytest.mark.parametrize("window", [40, 130, 400])
def test_flex_and_split_are_the_mask(window: int, way: Callable[[str], None]) -> None:
    """Over several blocks, either place of the heads, and numbers that do not rise."""
    way("flex")
    generator = torch.Generator().manual_seed(0)
    causal = causal_mask(400, window)
    for docs in (RISING, PICKED):
        q, k, v = (torch.randn(len(docs), 2, 400, 16, generator=generator) for _ in range(3))
        mask = dense_mask(docs, causal, q.dtype)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        heads_first = [t.transpose(0, 1).contiguous() for t in (q, k, v)]
        blocks = [documents.Blocks(block_mask(docs, window), heads) for heads in (0, 1)]
        torch.testing.assert_close(blocks[1].attend(q, k, v), expected, atol=1e-5, rtol=0)
        found = blocks[0].attend(*heads_first).transpose(0, 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        if docs is PICKED:
            continue
        spans = [Spans(documents.lengths_of(docs), causal, window, heads) for heads in (0, 1)]
        torch.testing.assert_close(spans[1].attend(q, k, v), expected, atol=1e-5, rtol=0)
        found = spans[0].attend(*heads_first).transpose(0, 1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_runs_on_which_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is said where FlexAttention does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    old = documents.documents(END, head_dim=64, heads=0, how="sdpa")
    assert (old.way("cuda"), old.way("cpu")) == ("split", "mask")
    assert "compute capability 6.1" in old.note("cuda")
    assert old.note("cpu") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    new = documents.documents(END, head_dim=64, heads=0, how="sdpa")
    assert (new.way("cuda"), new.note("cuda")) == ("flex", None)
    assert documents.documents(END, head_dim=64, heads=0, how="matmul").way("cuda") == "mask"
    assert "heads of 8" in documents.documents(END, head_dim=8, heads=0, how="sdpa").note("cuda")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    assert "Triton" in documents.documents(END, head_dim=64, heads=0, how="sdpa").note("cuda")
    assert documents.documents(None, head_dim=64, heads=0, how="sdpa") is None


# ---------------------------------------------------------------- what runs a model


def gradients(model: Family, run: Callable[..., Tensor], draws: Draws) -> list[Tensor]:
    model.zero_grad()
    loss = run(IDX, TARGETS, draws=draws)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("variant", ["gpt2", "depth", "looped routed"])
def test_running_blocks_again_changes_nothing(variant: str) -> None:
    model = model_of(plan_of(variant, **DRAWN[variant]))
    draws = Draws(KEYS, 4 if variant.startswith("looped") else None)
    once = gradients(model, model, draws)
    recompute(model)
    again = gradients(model, model, draws)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.filterwarnings("ignore:.*autograd functions are all static")  # torch of itself
@pytest.mark.parametrize("variant", ["gpt2", "depth", "looped"])
def test_compiled_it_is_the_same(variant: str, way: Callable[[str], None]) -> None:
    """Traced and interpreted: whole, and block by block; on a card's way as far as a CPU goes."""
    model = model_of(plan_of(variant, **({"mean_recurrence": 1} if variant == "looped" else {})))
    draws = Draws(KEYS, 2 if variant == "looped" else None)
    whole = torch.compile(model, backend="eager")
    for one, other in zip(*(gradients(model, m, draws) for m in (model, whole)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        expected = [model(IDX), model(IDX.flip(0))]
        way("flex")
        for idx, logits in zip((IDX, IDX.flip(0)), expected, strict=True):
            torch.testing.assert_close(whole(idx), logits, atol=1e-5, rtol=0)
        for block in model.blocks():
            block.compile(backend="eager")
        for idx, logits in zip((IDX, IDX.flip(0)), expected, strict=True):
            torch.testing.assert_close(model(idx), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", ["gpt2", "depth", "looped"])
def test_workers_and_evaluation_have_documents_too(variant: str) -> None:
    model = model_of(plan_of(variant))
    workers = Workers(model, count=2, device="cpu", precision="fp32")
    rows = [(IDX[i : i + 1].numpy(), TARGETS[i : i + 1].numpy()) for i in range(3)]
    found = val_loss(workers, rows, of_tokens=48, token_bytes=torch.ones(50).int().numpy())
    assert found is not None
    with torch.no_grad():
        assert found.loss == pytest.approx(model(IDX, TARGETS).item(), rel=1e-5)
        plain = model_of(plan_of(variant), end=None)(IDX, TARGETS).item()
    assert abs(found.loss - plain) > 3e-4


HOWS = ("ddp", "zero1", "fsdp")
SPREAD = ("gpt2", "depth", "looped routed")


def on_two(folder: Path) -> None:
    """In each of two ranks: its row's loss, and the norm of both's gradients."""
    ranks = join("cpu")
    found: dict[tuple[str, str], Any] = {}
    for variant in SPREAD:
        for how in HOWS:
            model = model_of(plan_of(variant))
            recompute(model)
            parallel = Parallel(model, how=how, ranks=ranks)
            row = slice(2 * ranks.rank, 2 * ranks.rank + 1)
            draws = Draws(KEYS[row], 4 if variant.startswith("looped") else None)
            loss = model(IDX[row], TARGETS[row], draws=draws) / 2
            loss.backward()
            norm = parallel.norm(parallel.reduce()).item()
            found[variant, how] = (ranks.sum(loss.item())[0], norm)
    torch.save(found, folder / f"{ranks.rank}.pt")
    ranks.part()


def test_spread_over_ranks_it_is_the_same(tmp_path: Path) -> None:
    started = start(2, on_two, tmp_path, folder=tmp_path)
    assert started.codes() == [0, 0], started.said(0)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for variant in SPREAD:
            model = model_of(plan_of(variant))
            draws = Draws(KEYS[::2], 4 if variant.startswith("looped") else None)
            loss = model(IDX[::2], TARGETS[::2], draws=draws)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            for how in HOWS:
                assert found[variant, how] == pytest.approx((loss.item(), norm), rel=1e-4), how


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hundred short documents in bytes, of which each is one letter, over and over."""
    root = tmp_path_factory.mktemp("data")
    letters = (chr(ord("a") + i * 7 % 26) * (5 + i % 7) for i in range(400))
    source = root / "letters.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in letters))
    return prepare(source=str(source), tokenizer="byte", root=root / "shards").folder


@pytest.mark.parametrize("family", ["depth", "looped"])
def test_a_run_trains_and_is_judged_within_documents(
    family: str,
    tmp_path: Path,
    shards: Path,
    data_plan: DataPlan,
    calibration: Calibration,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Losses are those of the masked model, in training, during the run and after it."""
    monkeypatch.setattr(host, "settle_threads", lambda threads: {})
    trained, judged = {}, {}
    for packing in ("plain", "documents"):
        data = dataclasses.replace(data_plan, tokenizer="byte", vocab_size=257, packing=packing)
        words = [*{"depth": DEPTH, "looped": LOOPED}[family], "data.tokenizer=byte"]
        run = finished(tmp_path / packing, words, data, shards, calibration)
        trained[packing] = [row["loss"] for row in run.latest("metrics")]
        run.write_json("env.json", {"data_folder": str(shards)})
        assert cli.main(["eval", str(run.path), "--checkpoint", "last", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["loss"]
        model = build(run.plan().model, document_end=256 if packing == "documents" else None)
        checkpoint.load(checkpoint.choose(run, "last"), model)
        losses = [loss_on(model, shards, tokens) for tokens in (64, None)]
        found = [run.latest("evals")[-1]["loss"], said]
        assert found == pytest.approx(losses, abs=1e-5)
        judged[packing] = said
    assert abs(trained["plain"][-1] - trained["documents"][-1]) > 1e-4
    assert abs(judged["plain"] - judged["documents"]) > 1e-4


def loss_on(model: Family, shards: Path, tokens: int | None) -> float:
    windows = val_windows(shards, sequence_len=16, max_tokens=tokens)
    inputs, targets = (torch.from_numpy(array) for array in next(windows.batches(10**6)))
    with torch.no_grad():
        return float(model(inputs, targets))


def test_a_run_without_ends_says_what_to_do(
    tmp_path: Path, data_plan: DataPlan, calibration: Calibration
) -> None:
    shards = prepare(source="shakespeare", tokenizer="char", root=tmp_path).folder
    asked = dataclasses.replace(data_plan, packing="documents")
    with pytest.raises(UserError, match=r"data\.packing=plain"):
        finished(tmp_path / "run", DEPTH, asked, shards, calibration)
    assert not (tmp_path / "run/checkpoints").exists()
