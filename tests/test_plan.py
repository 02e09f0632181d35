"""The plan: counts equal to the built model, refusals that name the remedy, honest predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest

from tuppence.config import DataPlan, Interval, ModelPlan, Plan, Run, override
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan import cost, estimate, hardware, loss
from tuppence.plan.asked import solve_model
from tuppence.plan.describe import local_option, plan_text
from tuppence.plan.hardware import Calibration, Timing
from tuppence.plan.solve import solve


@dataclasses.dataclass(frozen=True)
class World:
    """A run, a corpus and a machine; and short ways to plan and to change them."""

    run: Run
    data: DataPlan
    calibration: Calibration

    def plan(self, *words: str) -> Plan:
        return solve(override(self.run, list(words)), self.data, self.calibration)

    def with_data(self, **changes: Any) -> World:
        return dataclasses.replace(self, data=dataclasses.replace(self.data, **changes))

    def with_machine(self, **changes: Any) -> World:
        changed = dataclasses.replace(self.calibration, **changes)
        return dataclasses.replace(self, calibration=changed)


@pytest.fixture
def world(small_run: Run, data_plan: DataPlan, calibration: Calibration) -> World:
    return World(small_run, data_plan, calibration)


def model_plan(world: World, **asked: Any) -> ModelPlan:
    model = dataclasses.replace(world.run.model, **asked)
    data = dataclasses.replace(world.data, vocab_size=1)
    return solve_model(dataclasses.replace(world.run, model=model), data)


# ---------------------------------------------------------------- counts

SHAPES = [  # n_layer, n_head, n_embd, vocab_size, sequence_len
    (1, 1, 8, 2, 1),
    (1, 2, 16, 65, 8),
    (3, 3, 48, 97, 33),
    (5, 5, 40, 1000, 17),
    (12, 12, 768, 50257, 1024),
    (48, 25, 1600, 50257, 1024),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_parameters_are_the_models(world: World, shape: tuple[int, ...]) -> None:
    import torch

    from tuppence.model import build

    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_len")
    for bias, tied in itertools.product((False, True), repeat=2):
        plan = model_plan(world, **dict(zip(sizes, shape, strict=True)), bias=bias, tied_head=tied)
        with torch.device("meta"):
            model = build(plan)
        parameters = dict(model.named_parameters())
        assert plan.params == sum(p.numel() for p in parameters.values())
        linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
        assert plan.params_matmul == sum(w.numel() for w in linear)


def test_gpt2_small_counts_as_published(world: World) -> None:
    small = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "sequence_len": 1024}
    plan = model_plan(world, **small, bias=True)
    assert plan.tied_head  # GPT-2's own, unless something else is asked
    assert plan.params == 124_439_808
    assert plan.params_matmul == 12 * 12 * 768**2 + 50257 * 768
    # PaLM's appendix B: 6 N + 12 L H Q T with N = 123,532,032 multiplying weights
    assert plan.flops_per_token == 6 * 123_532_032 + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize("attention", ["sdpa", "matmul"])
@pytest.mark.parametrize("shape", [(1, 2, 16, 65, 64), (3, 2, 64, 300, 16)])
def test_flops_are_those_that_torch_counts(
    world: World, attention: str, shape: tuple[int, ...]
) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from tuppence.model import build

    sizes = ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_len")
    for bias, tied in ((False, True), (True, False)):
        plan = model_plan(world, **dict(zip(sizes, shape, strict=True)), bias=bias, tied_head=tied)
        model = build(plan, attention=attention, device="meta")
        tokens = torch.zeros(2, plan.sequence_len, dtype=torch.long, device="meta")
        # torch does not count inside its fused CPU kernel, so the same products go one by one
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(tokens, tokens).backward()
        counted = counter.get_total_flops() / tokens.numel()
        assert counted == pytest.approx(plan.flops_per_token, rel=0.01)


# ---------------------------------------------------------------- refusals: wrong input


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.n_embd=65"], ["model.n_embd=65", "model.n_head=2", "nearest", "66"]),
        (["model.n_head=3"], ["model.n_embd=64", "model.n_head=3", "nearest", "63"]),
        (["train.batch_tokens=500"], ["train.batch_tokens=500", "model.sequence_len=32", "512"]),
        (["train.batch_tokens=1"], ["train.batch_tokens=1", "model.sequence_len=32", "is 32"]),
        (["train.batch_tokens=0"], ["train.batch_tokens=0", "is 32"]),
        (["train.micro_batch=5"], ["train.micro_batch=5", "16 sequences", "nearest is 4"]),
        (["train.micro_batch=7"], ["train.micro_batch=7", "nearest is 8"]),
        (["train.micro_batch=99"], ["train.micro_batch=99", "nearest is 16"]),
        (["model.n_embd=none"], ["model.n_embd is not set"]),
        (["model.n_kv_head=1"], ["model.n_kv_head=1", "n_head=2"]),
        (["model.vocab_size=0"], ["model.vocab_size=0", "65 tokens"]),
        (["model.vocab_size=64"], ["model.vocab_size=64", "65 tokens"]),
        (["model.dropout=1"], ["model.dropout=1"]),
        (["model.dropout=0.1", "train.attention=sdpa"], ["train.attention=sdpa", "model.dropout"]),
        (["model.depth=12"], ["model.depth=12", "model.n_layer"]),
        (["train.optimizer=sgd"], ["train.optimizer=sgd", "adamw", "muon"]),
        (["train.optimizer=muon", "train.momentum=1"], ["train.momentum=1", "below 1"]),
        (["train.momentum=0.9"], ["train.momentum=0.9", "Muon", "train.beta1"]),
        (["train.head_rate=-1"], ["train.head_rate=-1: not below 0"]),
        (["train.schedule=linear"], ["train.schedule=linear", "cosine", "wsd"]),
        (["train.attention=flash"], ["train.attention=flash", "sdpa", "matmul"]),
        (["train.parallel=fsdp"], ["train.parallel=fsdp", "none", "torchrun"]),
        (["train.keep_every=0"], ["train.keep_every=0", "at least 1"]),
        (["train.stall_seconds=0.1"], ["train.stall_seconds=0.1", "at least 1"]),
        (["machine.usd_per_hour=0"], ["machine.usd_per_hour=0", "more than zero"]),
        (["train.seed=-1"], ["train.seed=-1"]),
        (["train.beta1=1"], ["train.beta1=1", "below 1"]),
        (["data.val_tokens=0"], ["data.val_tokens=0: at least 2"]),
        (["train.warmup=1.5"], ["train.warmup=1.5", "from 0 to 1"]),
        (["train.eval_every=0"], ["train.eval_every=0: at least 1"]),
        (["train.schedule=wsd", "train.decay=0.9", "train.warmup=0.2"], ["0.9", "0.2", "is 0.8"]),
        (["budget.usd=none"], ["no budget", "budget.usd", "budget.steps"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_names_value_rule_and_remedy(
    world: World, words: list[str], says: list[str]
) -> None:
    with pytest.raises(UserError) as refusal:
        world.plan(*words)
    message = str(refusal.value)
    assert "\n" not in message
    assert [part for part in says if part not in message] == []


@pytest.mark.parametrize(("tokens", "says"), [(0, "sequence of 32"), (512, "batch of 512")])
def test_a_corpus_too_short_is_refused(world: World, tokens: int, says: str) -> None:
    with pytest.raises(UserError, match=rf"data\.source=shakespeare: {tokens} .* one {says} \+ 1"):
        world.with_data(train_tokens=tokens).plan()
    assert world.with_data(train_tokens=513).plan().step.batch_tokens == 512


# ---------------------------------------------------------------- refusals: does not fit


@pytest.mark.parametrize("word", ["budget.usd=1e-5", "budget.hours=1e-4", "budget.usd=4.3e-4"])
def test_a_tiny_budget_does_not_fit(world: World, word: str) -> None:
    with pytest.raises(DoesNotFit, match=r"the budget buys .* give at least budget\.usd=") as e:
        world.plan(word)
    remedy = str(e.value).rpartition("budget.usd=")[2].partition(" ")[0]
    assert world.plan(f"budget.usd={1.1 * float(remedy)}").predicted.steps.mid >= 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("machine.gpu=H100", r"machine\.gpu=H100: .*CPU"),
        ("machine.gpu_count=1", r"machine\.gpu_count=1: .*CPU"),
        ("machine.cloud=aws", r"machine\.cloud=aws: .* this machine only"),
        ("machine.instance_type=p5.48xlarge", r"machine\.instance_type=p5"),
        ("machine.spot=on", r"machine\.spot=True"),
        ("budget.tokens=511", r"budget\.tokens=511 is less than one batch of 512"),
        ("machine.disk_gb=0.0001", r"machine\.disk_gb=0\.0001 is too little for three checkpoints"),
        ("machine.gpu_count=8", r"machine\.gpu_count=8: this machine has no CUDA GPU"),
        ("train.micro_batch=1024", r"train\.micro_batch=1024 needs 0\.7 GiB, .* has 0\.5"),
        ("model.n_layer=4000", r"needs \d+\.\d GiB, this machine has 0\.5; lower"),
    ],
)
def test_what_is_not_here_does_not_fit(world: World, word: str, says: str) -> None:
    tight = world.with_machine(memory_gib=0.48)
    batch = "train.batch_tokens=32768" if "micro" in word else "train.batch_tokens=512"
    with pytest.raises(DoesNotFit, match=says):
        tight.plan("budget.usd=100", word, batch)
    assert tight.plan(batch).step.micro_batch < 1024  # left to the plan, it finds one that fits


# ---------------------------------------------------------------- warnings


def codes(plan: Plan) -> set[str]:
    assert all(w.message and "\n" not in w.message for w in plan.warnings)
    return {w.code for w in plan.warnings}


@pytest.mark.parametrize(
    ("code", "words", "otherwise"),
    [
        ("epochs_4", ["budget.tokens=8e6"], ["budget.tokens=4e6"]),
        ("epochs_4", ["budget.tokens=16e6"], ["budget.tokens=17e6"]),
        ("epochs_16", ["budget.tokens=17e6"], ["budget.tokens=16e6"]),
        ("no_wall_clock_stop", ["budget.steps=10"], ["budget.steps=10", "budget.hours=1"]),
        ("tokens_floor", ["budget.tokens=1000"], ["budget.tokens=1024"]),
        ("eval_part", ["train.eval_tokens=1000"], ["train.eval_tokens=111540"]),
        ("assumed_price", ["machine.usd_per_hour=none"], ["machine.usd_per_hour=1"]),
        ("long_step", ["budget.hours=2e-3", "train.batch_tokens=65536"], ["budget.hours=2e-3"]),
        (
            "no_grace",
            ["budget.steps=3", "model.n_embd=1024", "train.batch_tokens=524288"],
            ["budget.steps=3"],
        ),
    ],
)
def test_warnings_come_when_due_and_only_then(
    world: World, code: str, words: list[str], otherwise: list[str]
) -> None:
    assert code in codes(world.plan(*words))
    assert code not in codes(world.plan(*otherwise))
    assert "data_estimated" not in codes(world.plan(*words))
    assert "data_estimated" in codes(world.with_data(exact=False).plan(*words))


def test_a_loss_is_promised_only_where_it_was_measured(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = world.with_data(source="texts/*.txt").plan()
    assert "loss_unknown" in codes(unknown)
    assert unknown.predicted.val_loss is None
    given = world.plan()
    fit = loss.Fit(
        source="shakespeare",
        tokenizer="char",
        recipe=loss.recipe_of(
            given.model, given.step.batch_tokens, given.optimizer, given.schedule
        ),
        floor=1.0,
        scale=20.0,
        alpha=0.25,
        min_tokens=1e6,
        max_tokens=4e6,
        spread=0.1,
        points=5,
    )
    monkeypatch.setattr(loss, "FITS", (fit,))
    known = world.plan("budget.tokens=2e6")
    promised = known.predicted.val_loss
    assert "loss_unknown" not in codes(known)
    assert promised is not None
    assert promised.mid == pytest.approx(1.0 + 20.0 * known.predicted.tokens.mid**-0.25)
    assert (promised.low, promised.high) == (promised.mid - 0.1, promised.mid + 0.1)
    for word in (
        "model.n_layer=3",
        "train.learning_rate=1e-4",
        "budget.tokens=9e6",
        "budget.tokens=4e5",
    ):
        words = [word] if "tokens" in word else ["budget.tokens=2e6", word]
        assert world.plan(*words).predicted.val_loss is None  # another shape, or too far away


# ---------------------------------------------------------------- predictions


def test_a_prediction_stays_within_the_budget(world: World) -> None:
    draw, found = random.Random(0), []
    for _ in range(200):  # at all sorts of prices, shapes and batches
        price, limit = 10 ** draw.uniform(-1.5, 2), 10 ** draw.uniform(0.6, 5)
        words = [f"machine.usd_per_hour={price}", f"budget.usd={price * limit / 3600}"]
        words += [f"budget.hours={limit / 3600 * draw.uniform(0.5, 2)}"]
        words += [f"model.n_layer={draw.randint(1, 12)}", f"model.n_embd={64 * draw.randint(1, 8)}"]
        words += [f"train.batch_tokens={32 * 2 ** draw.randint(0, 8)}"]
        with contextlib.suppress(DoesNotFit):
            found.append(world.plan(*words))
    assert len(found) > 100
    for plan in found:
        told = plan.predicted
        assert plan.budget.usd is not None
        assert plan.budget.hours is not None
        assert told.hours.high <= plan.budget.hours * (1 + 1e-9)
        assert told.usd.high <= plan.budget.usd * (1 + 1e-9)
        assert told.hours.mid * 3600 == pytest.approx(sum(told.phase_seconds.values()))
        assert told.usd.mid == pytest.approx(told.hours.mid * plan.machine.usd_per_hour)
        assert told.tokens.mid == told.steps.mid * plan.step.batch_tokens
        for name in ("step_seconds", "tokens_per_second", "mfu", "steps", "tokens", "hours", "usd"):
            interval = getattr(told, name)
            assert interval.low <= interval.mid <= interval.high, (name, plan)


@pytest.mark.parametrize("budget", ["budget.hours=1", "budget.steps=100000"])
@pytest.mark.parametrize("every", [10, 10_000])
def test_evaluations_asked_for_are_predicted(world: World, budget: str, every: int) -> None:
    told = world.plan(budget, f"train.eval_every={every}", "train.eval_tokens=1024").predicted
    count = 1 + (told.steps.mid - 1) // every
    expected = count * told.eval_seconds + told.fixed_seconds
    assert told.phase_seconds["evaluate"] == pytest.approx(expected)
    assert told.phase_seconds["save"] == pytest.approx(count * told.save_seconds, abs=1)
    assert told.phase_seconds["train"] == pytest.approx(told.steps.mid * told.step_seconds.mid)


def test_a_corpus_that_is_not_prepared_has_to_be(world: World) -> None:
    later = world.with_data(inputs_sha256=None).plan().predicted
    now = world.plan().predicted
    assert later.phase_seconds["prepare"] > now.phase_seconds["prepare"] > 0
    assert later.steps.mid < now.steps.mid


# ---------------------------------------------------------------- workers and timings


@pytest.mark.parametrize(
    ("words", "threads", "micro", "workers"),
    [
        ([], 1, 16, 1),
        ([], 2, 8, 2),  # a core each
        ([], 3, 4, 3),
        ([], 64, 1, 16),
        (["train.micro_batch=16"], 2, 16, 1),  # as asked, though a core has nothing to do
        (["train.micro_batch=4"], 2, 4, 2),
        (["train.compile=on"], 2, 16, 1),
        (["train.batch_tokens=16384"], 2, 128, 2),  # 4,096 tokens stay near the caches
    ],
)
def test_every_core_has_a_micro_batch(
    world: World, words: list[str], threads: int, micro: int, workers: int
) -> None:
    step = world.with_machine(threads=threads).plan(*words).step
    assert (step.micro_batch, step.workers) == (micro, workers)
    assert step.micro_batch * step.accumulation == step.batch_sequences
    assert estimate.rounds(step) == math.ceil(step.accumulation / workers)


def test_each_worker_has_memory_and_a_share_of_the_ceiling(world: World) -> None:
    two, one = world.plan("train.micro_batch=8"), world.plan("train.micro_batch=16")
    assert (two.step.workers, one.step.workers) == (2, 1)
    more = two.predicted.peak_memory_gib.mid - one.predicted.peak_memory_gib.mid
    assert more * cost.GIB == pytest.approx(4 * two.model.params + 2 * two.model.params_matmul)
    quarter = world.plan("train.micro_batch=2").predicted
    assert quarter.peak_memory_gib.mid < two.predicted.peak_memory_gib.mid
    seconds = [plan.predicted.step_seconds.mid for plan in (two, one)]
    update = 40 * two.model.params / 20e9
    assert seconds[1] - update == pytest.approx(2 * (seconds[0] - update))


def timing(**changes: Any) -> Timing:
    measured = Timing(
        precision="fp32",
        attention="sdpa",
        compile=False,
        micro_batch=4,
        workers=2,
        round_seconds=0.02,
        update_seconds=0.004,
        forward_seconds=0.006,
        source="measured by calibrate",
    )
    return dataclasses.replace(measured, **changes)


def test_the_fastest_measured_way_is_chosen_with_its_reason(world: World) -> None:
    first = world.plan("train.micro_batch=4")
    assert first.predicted.basis == "roofline"
    key = hardware.shape_key(first.model, 4, 2)
    ways = [timing(), timing(precision="bf16", attention="matmul", round_seconds=0.01)]
    measured = dataclasses.replace(world, calibration=world.calibration.with_timings(key, ways))
    plan = measured.plan("train.micro_batch=4")
    assert (plan.machine.precision, plan.machine.attention) == ("bf16", "matmul")
    assert "measured by calibrate" in plan.machine.precision_why
    assert plan.predicted.step_seconds.mid == pytest.approx(2 * 0.01 + 0.004)  # two rounds
    assert plan.machine.peak_tflops == world.calibration.matmul_tflops["bf16"]
    asked = measured.plan("train.micro_batch=4", "train.precision=fp32")
    assert (asked.machine.precision, asked.machine.precision_why) == ("fp32", "asked")
    assert asked.predicted.step_seconds.mid == pytest.approx(0.044)
    other = measured.with_machine(threads=1).plan("train.micro_batch=4")
    assert other.predicted.basis == "roofline"  # one worker was not measured


def test_timings_keep_the_newest_few_and_count_by_their_median(world: World) -> None:
    plan = world.plan()
    key = hardware.shape_key(plan.model, plan.step.micro_batch, plan.step.workers)
    known = world.calibration
    for tenths in (90, 80, 1, 2, 9, 3, 2):
        known = known.with_timings(key, [timing(round_seconds=tenths / 10)])
    assert [t.round_seconds for t in known.timings[key]] == [0.1, 0.2, 0.9, 0.3, 0.2]
    found = solve(world.run, world.data, known).predicted.step_seconds.mid
    assert found == pytest.approx(0.2 + 0.004)


def test_shape_keys_tell_shapes_apart(world: World) -> None:
    words = "model.n_layer=3 model.n_embd=128 model.n_head=4 model.sequence_len=16 "
    words += "model.vocab_size=100 model.bias=on model.tied_head=off model.dropout=0.1 "
    words += "train.micro_batch=4 train.compile=on"
    found = [world.plan(), *(world.plan(word) for word in words.split())]
    keys = {hardware.shape_key(p.model, p.step.micro_batch, p.step.workers) for p in found}
    assert len(keys) == len(found)


def test_calibrations_are_kept_in_the_cache_folder(
    calibration: Calibration, cache_home: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = dataclasses.replace(calibration, name=hardware.cpu_name())
    path = hardware.save_calibration(mine)
    assert cache_home in path.parents
    assert hardware.load_calibration("cpu", 2) == mine
    assert hardware.load_calibration("cpu", 3) is None
    hardware.save_calibration(calibration)  # of another machine
    assert hardware.load_calibration("cpu", 2) is None
    path.write_text("{}")  # of another version
    assert hardware.load_calibration("cpu", 2) is None


# ---------------------------------------------------------------- told


def test_this_machine_as_an_option_has_what_is_promised(world: World) -> None:
    plan = world.plan()
    option = local_option(plan)
    promised = (
        "cloud instance_type gpu gpu_count spot fits micro_batch peak_memory_gib tokens_per_second "
        "mfu train_hours usd tokens loss intervals"
    )
    assert set(promised.split()) <= option.keys()
    assert {"prepare", "train", "evaluate", "save", "total"} <= option["usd"].keys()
    spent = [usd for phase, usd in option["usd"].items() if phase != "total"]
    assert option["usd"]["total"] == pytest.approx(sum(spent))
    assert option["usd"]["total"] == pytest.approx(plan.predicted.usd.mid)
    low, high = option["intervals"]["tokens_per_second"]
    assert low <= option["tokens_per_second"] <= high
    assert json.loads(json.dumps(option, allow_nan=False)).keys() == option.keys()
    text = plan_text(plan)
    assert f"{plan.model.params:,} parameters" in text
    assert plan.warnings
    assert all(f"[{w.code}]" in text for w in plan.warnings)


def test_planning_imports_no_torch() -> None:
    program = (
        "import sys; import tuppence.plan.solve, tuppence.plan.describe, tuppence.cli; "
        "print(sorted({'torch', 'numpy', 'pyarrow'} & sys.modules.keys()))"
    )
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin the peak anew")
def test_what_was_freed_does_not_count_for_what_comes_after() -> None:
    """Many blocks below malloc's mmap threshold, freed but for the last: glibc keeps them."""
    program = (
        "from tuppence import host\n"
        "blocks = [bytearray(100_000) for _ in range(3_000)]\n"
        "last = bytearray(100_000)\n"
        "del blocks\n"
        "host.forget_peak_rss()\n"
        "print(host.peak_rss_gib())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.1


def test_the_promised_loss_covers_that_tokens_are_an_interval(world: World) -> None:
    """A budget in dollars buys more or fewer tokens; one in steps buys just these."""
    law = loss.Expectation(loss.FITS[0], "")
    exact = estimate._expected_loss(law, Interval(4e6, 4e6, 4e6))[0]
    by_time = estimate._expected_loss(law, Interval(3e6, 4e6, 5e6))[0]
    assert exact is not None
    assert by_time is not None
    assert exact.mid == by_time.mid
    assert exact.high - exact.mid == pytest.approx(loss.FITS[0].spread)
    fewer, more = (law.at(n)[0] for n in (3e6, 5e6))
    assert fewer is not None
    assert more is not None
    half = (fewer.mid - more.mid) / 2
    assert by_time.high - by_time.mid == pytest.approx(math.hypot(loss.FITS[0].spread, half))


def test_checkpoints_are_counted_before_the_disk_has_them(world: World) -> None:
    """The newest, the best and the one being written; milestones; never more than the limit."""
    each = world.plan("budget.steps=100").predicted.checkpoint_bytes

    def disk(*words: str) -> int:
        return world.plan("budget.steps=100", *words).predicted.disk_bytes

    assert disk() == 4 * each
    assert disk("train.keep_last=5") == 7 * each
    assert disk("train.keep_every=10") == 14 * each
    assert disk("train.keep_every=10", f"machine.disk_gb={6 * each / 1e9}") == 6 * each


def test_saves_come_as_often_as_writing_allows(world: World) -> None:
    by_clock = world.plan("budget.hours=1").cadence
    assert by_clock.save_every_seconds == 15
    assert by_clock.save_every_steps is None
    by_steps = world.plan("budget.steps=1000")
    assert by_steps.cadence.save_every_seconds is None
    assert by_steps.cadence.save_every_steps == round(15 / by_steps.predicted.step_seconds.mid)
    slow = dataclasses.replace(world.calibration, disk_write_mbs=0.5)
    rare = solve(override(world.run, ["budget.hours=1"]), world.data, slow)
    assert rare.cadence.save_every_seconds == pytest.approx(rare.predicted.save_seconds / 0.05)


def test_ranks_share_the_work_and_the_price_is_the_nodes(world: World) -> None:
    run = override(world.run, ["budget.steps=10", "machine.usd_per_hour=2"])
    one = solve(run, world.data, world.calibration)
    many = solve(run, world.data, world.calibration, ranks=4, nodes=2)
    assert (one.step.ranks, one.machine.parallel) == (1, "none")
    assert (many.step.ranks, many.machine.parallel, many.machine.nodes) == (4, "zero1", 2)
    assert many.step.batch_tokens == one.step.batch_tokens
    assert many.machine.usd_per_hour == 2 * one.machine.usd_per_hour
    assert many.machine.peak_tflops == 4 * one.machine.peak_tflops
    assert many.predicted.step_seconds.mid < one.predicted.step_seconds.mid
    with pytest.raises(UserError, match=r"is not model\.sequence_len=.* each of 3 processes; the"):
        solve(run, world.data, world.calibration, ranks=3)


def test_weights_that_do_not_fit_whole_are_spread_by_rows(world: World) -> None:
    large = ["budget.steps=10", "model.n_layer=12", "model.n_embd=768", "train.micro_batch=1"]

    def planned(memory_gib: float, *words: str) -> Plan:
        machine = dataclasses.replace(world.calibration, memory_gib=memory_gib)
        return solve(override(world.run, [*large, *words]), world.data, machine, ranks=2)

    whole, rows = (
        planned(1000, f"train.parallel={how}").predicted.peak_memory_gib.mid
        for how in ("zero1", "fsdp")
    )
    assert rows < 0.9 * whole
    assert planned(2.6 * whole).machine.parallel == "zero1"
    assert planned(2.4 * whole).machine.parallel == "fsdp"
