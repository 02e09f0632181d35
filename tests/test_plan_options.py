"""The table: every machine of the book, priced, ordered, refused with a reason; sizes chosen."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tuppence import recipes
from tuppence.config import Budget, DataPlan, Run, override
from tuppence.errors import UserError
from tuppence.plan import laws
from tuppence.plan.flags import flags
from tuppence.plan.market import sellers
from tuppence.plan.options import Option, Standing, options, ranked, usd_per_flop
from tuppence.plan.prices import Book, price_book
from tuppence.plan.table import document, options_text, plot
from tuppence.plan.work import DEPTHS


@pytest.fixture(scope="module")
def book() -> Book:
    return price_book()


def corpus(source: str = "fineweb", tokenizer: str = "gpt2", tokens: float = 1e13) -> DataPlan:
    vocab = {"gpt2": 50257, "bpe:32768": 32768, "char": 17}[tokenizer]
    return DataPlan(
        source=source,
        tokenizer=tokenizer,
        text_field="text",
        max_tokens=None,
        val_tokens_asked=None,
        vocab_size=vocab,
        train_tokens=int(tokens),
        val_tokens=10_485_760,
        bytes_per_token=4.5,
        inputs_sha256=None,
        exact=False,
        packing="plain",
    )


def asked(recipe: str, *words: str) -> Run:
    return override(recipes.get(recipe), list(words))


def told(option: Option) -> dict[str, float]:
    assert option.stages is not None
    return {**option.stages.usd, "total": option.stages.total_usd}


# ---------------------------------------------------------------- the table


def test_every_priced_machine_is_in_the_table_once_per_terms(book: Book) -> None:
    run = asked("llmc_gpt2_124m")
    found = options(run, corpus(), book)
    assert len(found) == len(sellers(run.machine, book, in_dollars=False))
    priced = [o for o in book.offers if o.gpu_count]
    terms = sum((o.usd_per_hour is not None) + (o.spot_usd_per_hour is not None) for o in priced)
    assert len(found) == terms > 80
    fitting = [o for o in found if o.fits]
    assert found[: len(fitting)] == fitting
    assert len(fitting) > 60
    dollars = [told(o)["total"] for o in fitting]
    assert dollars == sorted(dollars)


def test_the_work_that_is_fixed_is_the_same_everywhere(book: Book) -> None:
    for option in options(asked("llmc_gpt2_124m"), corpus(), book):
        if option.fits:
            assert option.tokens is not None
            assert option.tokens.mid == option.tokens.low == 18_865 * 2**19
            assert option.job is not None
            assert option.job.tokens_per_step == 2**19


def test_dollars_by_phase_add_up_and_hours_are_those_of_the_machine(book: Book) -> None:
    for option in options(asked("llmc_gpt2_124m"), corpus(), book)[:20]:
        assert option.stages is not None
        assert option.train_hours is not None
        assert option.tokens_per_second is not None
        assert option.tokens is not None
        assert sum(option.stages.usd.values()) == pytest.approx(told(option)["total"])
        rate = option.seller.usd_per_hour * option.nodes
        assert option.stages.training_usd == pytest.approx(rate * option.train_hours.mid)
        seconds = option.tokens.mid / option.tokens_per_second.mid
        assert option.stages.seconds["train"] == pytest.approx(seconds)


@pytest.mark.parametrize("usd", [5.0, 100.0])
def test_a_dollar_budget_is_spent_and_not_passed(book: Book, usd: float) -> None:
    run = asked("llmc_gpt2_124m", f"budget.usd={usd}")
    fitting = [o for o in options(run, corpus(), book) if o.fits]
    assert len(fitting) > 30
    for option in fitting:
        assert option.stages is not None
        one_step = option.step_seconds.mid if option.step_seconds else 0.0
        step_usd = one_step / 3600 * option.seller.usd_per_hour
        assert option.stages.training_usd <= usd * (1 + 1e-9)
        assert option.stages.training_usd >= 0.97 * usd - step_usd - 0.06 * usd


def test_a_budget_in_hours_is_the_time_that_the_machine_is_held(book: Book) -> None:
    run = asked("llmc_gpt2_124m", "budget.hours=2", "machine.gpu=H100", "machine.gpu_count=8")
    for option in options(run, corpus(), book):
        assert option.train_hours is not None
        assert 1.85 < option.train_hours.mid <= 2


def test_of_dollars_and_tokens_the_first_reached_ends_the_run(book: Book) -> None:
    both = asked("llmc_gpt2_124m", "budget.usd=1000", "budget.tokens=10e9")
    found = [o for o in options(both, corpus(), book) if o.fits]
    dollars = [told(o)["total"] for o in found]
    assert dollars[0] == min(dollars)  # all learn as much; the cheapest is the best
    for option in found:
        assert option.tokens is not None
        assert option.tokens.mid <= 10e9
    assert found[0].tokens is not None
    assert found[0].tokens.mid == 10_000_000_000 // 2**19 * 2**19
    poor = asked("llmc_gpt2_124m", "budget.usd=5", "budget.tokens=1e12")
    for option in options(poor, corpus(), book):
        if option.fits:
            assert option.stages is not None
            assert option.stages.training_usd <= 5


def test_too_small_a_budget_says_what_would_buy_a_step(book: Book) -> None:
    run = asked("llmc_gpt2_124m", "budget.usd=0.01")
    found = options(run, corpus(), book)
    assert not any(o.fits for o in found)
    assert all("one step" in (o.why_not or "") for o in found if o.job is not None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["machine.gpu=A10G"], {"A10G-24GB"}),
        (["machine.gpu=A100-80GB"], {"A100-80GB-SXM4", "A100-80GB-PCIe"}),
        (["machine.gpu=A100-80GB-PCIe"], {"A100-80GB-PCIe"}),
        (["machine.cloud=lambda", "machine.gpu_count=8"], None),
        (["machine.spot=on"], None),
        (["machine.instance_type=p5.48xlarge"], {"H100-80GB-SXM5"}),
    ],
)
def test_machine_keys_narrow_the_table(
    book: Book, words: list[str], expected: set[str] | None
) -> None:
    found = options(asked("llmc_gpt2_124m", *words), corpus(), book)
    assert found
    if expected is not None:
        assert {o.gpu.name for o in found} == expected
    if "machine.spot=on" in words:
        assert all(o.seller.spot for o in found)
    if "machine.cloud=lambda" in words:
        assert {(o.seller.offer.cloud, o.seller.offer.gpu_count) for o in found} == {("lambda", 8)}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["machine.cloud=awz"], ["machine.cloud=awz", "aws"]),
        (["machine.instance_type=p5.48xlrge"], ["p5.48xlrge", "p5.48xlarge"]),
        (["machine.gpu=H10000"], ["H10000", "H100"]),
        (["machine.gpu=T4", "machine.cloud=nebius"], ["machine.gpu=T4", "machine.cloud=nebius"]),
        (["machine.usd_per_hour=3", "machine.instance_type=mine"], ["=mine", "price book"]),
        (["machine.cloud=foo", "machine.gpu=H100", "machine.usd_per_hour=3"], ["foo"]),
        (["machine.gpu=H100", "machine.gpu_count=0"], ["gpu_count=0", "leave one out"]),
        (
            ["machine.gpu=H100", "machine.gpu_count=1", "train.parallel=fsdp"],
            ["train.parallel=fsdp", "on 1 GPU it is none"],
        ),
        (["model.vocab_size=100"], ["model.vocab_size=100", "50257"]),
        (["train.learning_rate=-1"], ["learning_rate=-1"]),
        (["train.warmup=7"], ["warmup=7"]),
        (["train.batch_tokens=0"], ["batch_tokens=0", "nearest is 1024"]),
        (["budget.steps=1e300"], ["at most"]),
        (["model.window_pattern=SL"], ["window_pattern=SL", "gpt2 has no such part", "depth"]),
        (["machine.mfu=40"], ["machine.mfu=40", "at most 1"]),
        (["train.batch_tokens=500000"], ["500000", "sequence_len=1024", "499712"]),
        (
            ["machine.gpu=A100", "machine.gpu_count=8", "train.micro_batch=7"],
            ["train.micro_batch=7", "8 GPUs", "nearest is 8"],
        ),
    ],
)
def test_wrong_words_name_the_value_and_the_remedy(
    book: Book, words: list[str], says: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        options(asked("llmc_gpt2_124m", *words), corpus(), book)
    assert all(word in str(refusal.value) for word in says), refusal.value


def test_a_batch_that_does_not_divide_over_some_machine_leaves_the_others(book: Book) -> None:
    run = asked("llmc_gpt2_124m", f"train.batch_tokens={12 * 1024}")
    found = {o.seller.offer.gpu_count: o for o in options(run, corpus(), book)}
    assert found[1].fits
    assert found[4].fits
    assert "nearest is 8192" in (found[8].why_not or "") or "16384" in (found[8].why_not or "")


def test_own_price_assumed_price_and_a_machine_that_is_not_in_the_book(book: Book) -> None:
    words = ["machine.gpu=H100-PCIe", "machine.gpu_count=8"]
    (mine,) = options(asked("llmc_gpt2_124m", *words, "machine.usd_per_hour=32"), corpus(), book)
    assert (mine.seller.usd_per_hour, mine.gpu.name) == (32.0, "H100-80GB-PCIe")
    assert not mine.seller.assumed
    assert mine.stages is not None
    assert mine.stages.seconds["provision"] > 0
    (local,) = options(
        asked("llmc_gpt2_124m", *words, "machine.usd_per_hour=32", "machine.cloud=local"),
        corpus(),
        book,
    )
    assert local.stages is not None
    assert local.stages.seconds["provision"] == local.stages.usd["store"] == 0
    (assumed,) = options(asked("llmc_gpt2_124m", *words), corpus(), book)
    assert assumed.seller.assumed
    assert assumed.seller.usd_per_hour == 8 * 2.79  # eight times the cheapest of that card
    (nobody,) = options(asked("llmc_gpt2_124m", "machine.gpu=MI300X"), corpus(), book)
    assert nobody.seller.usd_per_hour == 0.40
    codes = [w.code for w in flags(asked("llmc_gpt2_124m"), corpus(), assumed, year=2026)]
    assert "assumed_price" in codes


def test_a_machine_that_is_free_is_planned(tmp_path: Path) -> None:
    own = tmp_path / "mine.csv"
    own.write_text(
        "cloud,instance_type,accelerator,accelerator_count,price_usd_h\nlab,dgx,A100-80GB,8,0\n",
        encoding="utf-8",
    )
    words = ["machine.instance_type=dgx", "budget.hours=2"]
    (free,) = options(asked("llmc_gpt2_124m", *words), corpus(), price_book(own))
    assert free.train_hours is not None
    assert 1.8 < free.train_hours.mid <= 2
    assert told(free)["train"] < 0.01


# ---------------------------------------------------------------- fits, layouts, speeds


def test_cards_without_bf16_train_in_fp16_or_refuse_bf16(book: Book) -> None:
    v100 = options(asked("llmc_gpt2_124m", "machine.gpu=V100"), corpus(), book)
    assert {o.job.precision for o in v100 if o.job} == {"fp16"}
    refused = options(
        asked("llmc_gpt2_124m", "machine.gpu=V100", "train.precision=bf16"), corpus(), book
    )
    assert all("no bf16" in (o.why_not or "") for o in refused)


def test_the_guides_models_that_cannot_fit_do_not(book: Book) -> None:
    words = ["model.depth=64", "train.micro_batch=4", "train.parallel=zero1"]
    (d64,) = options(asked("depth_1000usd", *words), corpus("arithmetic", "char"), book)
    assert not d64.fits
    assert "GiB" in (d64.why_not or "")
    run = asked("looped_546m", "machine.gpu=A10G", "machine.gpu_count=1", "train.micro_batch=8")
    for option in options(run, corpus("fineweb_edu", "bpe:32768"), book):
        assert not option.fits
        assert "micro-batch 8" in (option.why_not or "")


def test_what_was_fixed_is_answered_for_exactly_that(book: Book) -> None:
    words = ["machine.gpu=A100-80GB", "machine.gpu_count=8", "train.micro_batch=16"]
    for option in options(asked("llmc_gpt2_124m", *words), corpus(), book):
        assert option.job is not None
        assert (option.job.micro_batch, option.job.accumulation) == (16, 4)


def test_a_fixed_mfu_stands_in_for_the_roofline(book: Book) -> None:
    words = ["machine.gpu=A10G", "machine.gpu_count=1", "machine.mfu=0.4"]
    run = asked("looped_546m", *words)
    option = options(run, corpus("fineweb_edu", "bpe:32768"), book)[0]
    assert option.tokens_per_second is not None
    flops = option.work.shape.flops_per_token
    assert option.tokens_per_second.mid == pytest.approx(0.4 * 70e12 / flops)
    assert option.tokens_per_second.low == option.tokens_per_second.high
    assert 10e9 / option.tokens_per_second.mid / 3600 == pytest.approx(723, abs=1)


def test_nodes_multiply_cards_and_dollars(book: Book) -> None:
    words = ["machine.instance_type=p5.48xlarge", "machine.spot=off"]
    one = options(asked("llmc_gpt2_124m", *words), corpus(), book)[0]
    two = options(asked("llmc_gpt2_124m", *words, "machine.nodes=2"), corpus(), book)[0]
    assert two.job is not None
    assert two.job.gpu_count == 16
    assert one.tokens_per_second is not None
    assert two.tokens_per_second is not None
    assert one.tokens_per_second.mid < two.tokens_per_second.mid <= 2 * one.tokens_per_second.mid
    assert told(two)["train"] >= told(one)["train"] * 0.999


# ---------------------------------------------------------------- sizes


def test_the_size_is_the_one_that_learns_most(book: Book) -> None:
    """The search along the dial finds what trying every setting finds."""
    words = ["data.source=fineweb_edu", "machine.gpu=H100", "machine.gpu_count=8"]
    run = asked("auto", *words, "budget.usd=100", "machine.cloud=lambda")
    data = corpus("fineweb_edu", "bpe:32768")
    (found,) = options(run, data, book)
    losses = {}
    for depth in DEPTHS:
        (at,) = options(override(run, [f"model.depth={depth}"]), data, book)
        if at.fits and at.loss is not None:
            losses[depth] = at.loss.interval.mid
    assert len(losses) > 8
    assert found.work.depth == min(losses, key=lambda d: losses[d])


def test_more_dollars_train_a_larger_model_to_a_lower_loss(book: Book) -> None:
    data, words = corpus("fineweb_edu", "bpe:32768"), ["machine.instance_type=p5.48xlarge"]
    best = [
        options(asked("auto", *words, f"budget.usd={usd}"), data, book)[0]
        for usd in (50, 500, 5000)
    ]
    depths = [o.work.depth or 0 for o in best]
    losses = [o.loss.interval.mid for o in best if o.loss]
    assert depths == sorted(set(depths))
    assert losses == sorted(losses, reverse=True)
    batches = [o.work.recipe.batch_tokens for o in best]
    assert batches == sorted(batches)


def test_fixed_tokens_are_the_same_work_on_every_machine(book: Book) -> None:
    run = asked("auto", "budget.tokens=2e9")
    found = options(run, corpus("fineweb_edu", "bpe:32768"), book)
    depths = {o.work.depth for o in found}
    assert len(depths) == 1
    ratio = 2e9 / found[0].work.shape.params_matmul
    assert 10.5 / 1.5 < ratio < 10.5 * 1.5


def test_a_law_of_one_size_does_not_choose_sizes(book: Book) -> None:
    words = ["data.source=fineweb", "data.tokenizer=gpt2", "machine.instance_type=p5.48xlarge"]
    run = asked("auto", *words, "machine.spot=off")
    (found,) = options(run, corpus(), book)
    assert found.loss is not None
    assert found.tokens is not None
    ratio = found.tokens.mid / found.work.shape.params_matmul
    assert 10.5 / 1.4 < ratio < 10.5 * 1.4


def test_the_laws_are_read_at_the_tokens_that_will_be_seen(book: Book) -> None:
    words = ["model.depth=12", "machine.instance_type=p5.48xlarge", "machine.spot=off"]
    data = corpus("fineweb_edu", "bpe:32768")
    (many,) = options(asked("auto", *words, "budget.tokens=1e11"), data, book)
    assert many.work.recipe == laws.recipe(many.work.shape, "muon", 1e11)
    (few,) = options(asked("auto", *words, "budget.usd=8"), data, book)
    assert few.tokens is not None
    assert few.work.recipe.batch_tokens <= few.tokens.mid / 50


def test_repeats_do_not_make_a_small_corpus_large(book: Book) -> None:
    run = asked("auto", "budget.usd=100", "machine.instance_type=p5.48xlarge", "machine.spot=off")
    (small,) = options(run, corpus("mine", "bpe:32768", tokens=3e8), book)
    (large,) = options(run, corpus("mine", "bpe:32768"), book)
    assert small.work.shape.params < large.work.shape.params


def test_a_corpus_must_fill_a_batch(book: Book) -> None:
    with pytest.raises(UserError, match="less than one batch"):
        options(asked("llmc_gpt2_124m"), corpus(tokens=2000), book)


def test_a_short_run_is_not_promised_a_loss_worse_than_guessing(book: Book) -> None:
    words = ["train.batch_tokens=1024", "budget.steps=2", "machine.gpu=H100", "machine.gpu_count=1"]
    for option in options(asked("llmc_gpt2_124m", *words), corpus(), book):
        assert option.loss is None
        assert "too short" in option.loss_why


def test_without_a_known_loss_the_size_is_compute_optimal(book: Book) -> None:
    run = asked("auto", "budget.usd=200", "machine.instance_type=p5.48xlarge", "machine.spot=off")
    (found,) = options(run, corpus("mine", "bpe:32768"), book)
    assert found.loss is None
    assert "unknown data: " in found.loss_why
    assert "refit after" in found.loss_why
    assert found.tokens is not None
    ratio = found.tokens.mid / found.work.shape.params_matmul
    assert 10.5 / 1.4 < ratio < 10.5 * 1.4


def test_ranks() -> None:
    cheap = Standing(fits=True, usd=1.0, usd_per_flop=1.0, loss=3.0)
    dear = Standing(fits=True, usd=2.0, usd_per_flop=0.5, loss=2.9)
    never = Standing(fits=False, usd=math.inf, usd_per_flop=math.inf, loss=None)
    fixed, dollars, hours = Budget(tokens=1), Budget(usd=2.0), Budget(hours=1.0)
    assert ranked([never, dear, cheap], fixed) == [2, 1, 0]
    assert ranked([never, cheap, dear], dollars) == [2, 1, 0]  # the lower loss
    assert ranked([never, cheap, dear], hours) == [2, 1, 0]  # fewer dollars for the work
    tied = dataclasses.replace(cheap, usd=0.5)
    assert ranked([cheap, tied], dollars) == [1, 0]  # the same loss for less
    unknown = dataclasses.replace(cheap, loss=None)
    assert ranked([unknown, dear], dollars) == [1, 0]  # what is promised before what is not
    more = dataclasses.replace(unknown, usd_per_flop=0.1)
    assert ranked([unknown, more], dollars) == [1, 0]


def test_text_that_is_used_up_makes_no_machine_better() -> None:
    """Twice the money for twice the passes beyond the sixteenth is worth as much as it was."""
    some = usd_per_flop(10.0, tokens=16e6, unique=1e6, flops_per_token=1.0)
    twice = usd_per_flop(20.0, tokens=32e6, unique=1e6, flops_per_token=1.0)
    assert twice == pytest.approx(some)
    fresh = usd_per_flop(10.0, tokens=16e6, unique=1e9, flops_per_token=1.0)
    assert fresh == pytest.approx(10.0 / 16e6)
    assert some > fresh


def test_dollars_need_a_price(book: Book) -> None:
    run = asked("llmc_gpt2_124m", "machine.gpu=MI300X", "budget.usd=20")
    with pytest.raises(UserError, match="budget in dollars needs a price"):
        options(run, corpus(), book)


# ---------------------------------------------------------------- flags


def flagged(recipe: str, *words: str, data: DataPlan, year: int = 2026) -> dict[str, str]:
    run = asked(recipe, *words)
    option = options(run, data, price_book())[0]
    assert option.fits, option.why_not
    return {w.code: w.message for w in flags(run, data, option, year=year)}


def test_each_warning_of_a_plan() -> None:
    web, small = corpus(), corpus("openwebtext", tokens=9.04e9)
    a100 = ["machine.gpu=A100", "machine.gpu_count=8"]
    openwebtext = flagged("nanogpt_openwebtext", data=small)
    assert "32.6 epochs" in openwebtext["epochs_16"]
    assert {"no_wall_clock_stop", "data_estimated"} <= openwebtext.keys()
    some = flagged("llmc_gpt2_124m", "budget.tokens=5e10", *a100, data=small)
    assert "epochs_4" in some
    assert "epochs_16" not in some
    impossible = flagged("llmc_gpt2_124m", *a100, "budget.tokens=1e11", "budget.hours=4", data=web)
    assert "faster_than_possible" in impossible
    assert "no_wall_clock_stop" not in impossible
    fixed = flagged("llmc_gpt2_124m", *a100, "machine.mfu=0.9", data=web)
    assert "faster_than_possible" in fixed
    old = flagged("llmc_gpt2_124m", "machine.instance_type=g5.xlarge", data=web)
    assert "2025" in old["stale_price"]
    later = flagged("llmc_gpt2_124m", "machine.cloud=verda", data=web, year=2027)
    assert "stale_price" in later
    full = flagged("llmc_gpt2_124m", *a100, "machine.disk_gb=10", data=web)
    assert "machine.disk_gb=10" in full["checkpoint_vs_disk"]
    hasty = flagged("llmc_gpt2_124m", *a100, "budget.steps=20", data=web)
    assert "20 optimizer steps" in hasty["few_steps"]
    looped = flagged("looped_546m", *a100, data=corpus("fineweb_edu", "bpe:32768"))
    assert "mean 4.5" in looped["loops_vary"]
    assert "refit after" in looped["loss_unknown"]


def test_a_plain_affordable_run_raises_nothing() -> None:
    data = dataclasses.replace(corpus("fineweb_edu", "bpe:32768"), exact=True)
    found = flagged("auto", "budget.usd=100", "machine.cloud=verda", data=data)
    assert set(found) <= {"loss_extrapolated", "not_exportable"}


# ---------------------------------------------------------------- shown


def test_the_document_of_an_option(book: Book) -> None:
    first = options(asked("llmc_gpt2_124m"), corpus(), book)[0]
    said = document(first)
    promised = (
        "cloud instance_type gpu gpu_count spot fits micro_batch peak_memory_gib tokens_per_second "
        "mfu train_hours usd tokens loss intervals"
    )
    assert set(promised.split()) <= said.keys()
    assert said["usd"]["total"] == pytest.approx(
        sum(v for k, v in said["usd"].items() if k != "total")
    )
    for name, (low, high) in said["intervals"].items():
        middle = said["usd"]["total"] if name == "usd" else said[name]
        assert low <= middle <= high, name
    assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_what_does_not_fit_is_in_the_document_with_its_reason(book: Book) -> None:
    last = options(asked("llmc_gpt2_124m", "budget.usd=0.2"), corpus(), book)[-1]
    said = document(last)
    assert said["fits"] is False
    assert said["why_not"]
    assert json.dumps(said, allow_nan=False)


def test_the_table_shows_the_best_and_counts_the_rest(book: Book) -> None:
    found = options(asked("llmc_gpt2_124m", "budget.usd=3"), corpus(), book)
    text = options_text([document(o) for o in found], rows=3)
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["machine", "GPUs"]
    assert found[0].seller.offer.instance_type in lines[1]
    assert "more that fit" in text
    refused = sum(not o.fits for o in found)
    assert f"{refused} of {len(found)} cannot:" in text
    assert "the budget does not buy boot" in text
    assert len({len(line) for line in lines[1:4]}) == 1  # aligned


def test_a_narrow_screen_loses_columns_not_the_total(book: Book) -> None:
    found = [document(o) for o in options(asked("llmc_gpt2_124m"), corpus(), book)]
    wide = options_text(found).splitlines()[0]
    for width in (150, 120, 100, 80):
        lines = options_text(found, width=width).splitlines()[:5]
        assert max(map(len, lines)) <= width
        assert {"machine", "total", "tokens/s"} <= set(lines[0].split())
        assert len(lines[0].split()) < len(wide.split())


def test_a_machine_that_stands_twice_is_told_by_its_region(book: Book) -> None:
    words = ["machine.instance_type=p4d.24xlarge", "machine.spot=off"]
    text = options_text(
        [document(o) for o in options(asked("llmc_gpt2_124m", *words), corpus(), book)]
    )
    assert "aws p4d.24xlarge us-east-1" in text
    assert "aws p4d.24xlarge ap-south-1" in text


def test_the_plot_has_a_curve_for_each_machine(book: Book) -> None:
    data = corpus("fineweb_edu", "bpe:32768")
    curves = []
    for name in ("gpu_8x_h100_sxm5", "gpu_1x_gh200"):
        points = [
            options(asked("auto", f"machine.instance_type={name}", f"budget.usd={usd}"), data, book)
            for usd in (50, 100, 200)
        ]
        curves.append((name, [p[0] for p in points]))
    svg = plot(curves, name="auto")
    assert svg.count("<polyline") == svg.count("<polygon") == 2
    assert "predicted val loss, bits/byte" in svg
    assert all(name in svg for name, _ in curves)
    assert "nan" not in svg


def test_planning_is_a_function_of_its_inputs(book: Book) -> None:
    """Two calls with the same words agree."""
    run = asked("llmc_gpt2_124m", "machine.gpu=H100")
    assert options(run, corpus(), book) == options(run, corpus(), book)
