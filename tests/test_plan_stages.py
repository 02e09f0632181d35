"""What is charged beside training: by hand, and by its properties."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from price_rows import find

from tuppence.errors import UserError
from tuppence.plan import stages as module
from tuppence.plan.offers import Offer
from tuppence.plan.prices import Book, at_own_price, own_machine, price_book
from tuppence.plan.stages import (
    TRAINING_PHASES,
    Stages,
    affordable_train_seconds,
    egress_usd,
    machine_usd,
    preparation_seconds,
    shard_bytes,
    stages,
    storage_usd,
)

HOUR = 3600.0
PHASES = "provision install prepare store egress compile train data_wait evaluate save lost idle"


def offer(**values: object) -> Offer:
    plain = Offer(
        cloud="aws", instance_type="gpu", accelerator="A100", gpu="A100-40GB-SXM4", gpu_count=8,
        vcpus=96, memory_gib=1152, usd_per_hour=36.0, spot_usd_per_hour=18.0, region="us-east-1",
        date="2026", source="a test",
    )  # fmt: skip
    return replace(plain, **values)  # type: ignore[arg-type]


def cpu(**values: object) -> Offer:
    return offer(
        instance_type="cpu", accelerator="", gpu=None, gpu_count=0, vcpus=8.0, usd_per_hour=0.36
    ) if not values else replace(cpu(), **values)  # type: ignore[arg-type]  # fmt: skip


def bill(machine: Offer, *others: Offer, spot: bool = False, **values: object) -> Stages:
    asked = {
        "nodes": 1,
        "train_seconds": 10 * HOUR,
        "tokens_to_prepare": 6_000_000_000,
        "vocab_size": 50257,
        "checkpoint_bytes": 1_500_000_000,
        "kept_checkpoints": 2,
        "save_seconds_each": 2.0,
        "save_every_seconds": 600.0,
        "eval_seconds": 100.0,
    } | values
    book = Book((machine, *others), ())
    return stages(machine, spot=spot, book=book, **asked)  # type: ignore[arg-type]


# ---------------------------------------------------------------- by hand


def test_the_arithmetic_of_the_first_guide() -> None:
    """12 h of a CPU machine, 100 GB for a month, 96 h of eight A100, at the guide's prices."""
    assert machine_usd(12 * HOUR, usd_per_hour=0.34) == pytest.approx(4.08)
    assert storage_usd(100, months=1, usd_per_gb_month=0.10) == pytest.approx(10)
    assert machine_usd(96 * HOUR, usd_per_hour=33.05) == pytest.approx(3172.80)
    a100s = at_own_price(find(price_book(), "p4d.24xlarge"), 33.05)
    of_guide = bill(a100s, train_seconds=96 * HOUR)
    assert of_guide.usd["train"] == pytest.approx(3172.80)


def test_the_training_machine_by_hand() -> None:
    """A cent a second, so dollars are seconds / 100. Shards: 12 GB at 500 MB/s."""
    one = bill(offer(), cpu())
    seconds = {
        "provision": 180.0, "install": 60.0, "compile": 60.0, "data_wait": 24.0, "train": 36000.0,
        "evaluate": 100.0, "save": (60 + 1) * 2.0, "lost": 0.0, "idle": 60.0,
    }  # fmt: skip
    assert {p: one.seconds[p] for p in TRAINING_PHASES} == pytest.approx(seconds)
    assert {p: one.usd[p] for p in TRAINING_PHASES} == pytest.approx(
        {p: s / 100 for p, s in seconds.items()}
    )
    assert one.training_seconds == pytest.approx(36606)
    assert one.training_usd == pytest.approx(366.06)
    assert set(one.usd) == set(one.seconds) == set(PHASES.split())
    assert one.total_usd == pytest.approx(sum(one.usd.values()))


def test_beside_it_by_hand() -> None:
    one = bill(offer(), cpu())
    # 18 GB at 100 MB/s, then 6e9 tokens at 8 x 0.75M a second, after two minutes of boot
    assert one.seconds["prepare"] == pytest.approx(120 + 1000)  # downloading takes 180 of them
    assert one.usd["prepare"] == pytest.approx(1120 * 0.36 / 3600)
    # a quarter of a month: 12 GB of shards and two checkpoints of 1.5 GB in S3; a disk while held
    disk = 100 * 0.08 * 36606 / (730 * HOUR)
    assert one.usd["store"] == pytest.approx(15 * 0.25 * 0.023 + disk)
    assert one.usd["egress"] == pytest.approx(1.5 * 0.09)
    assert one.notes == ("prepare_on: aws cpu",)


def test_nodes_multiply_the_training_machine_alone() -> None:
    one, four = bill(offer(), cpu()), bill(offer(), cpu(), nodes=4)
    assert four.training_usd == pytest.approx(4 * one.training_usd)
    assert four.usd["prepare"] == one.usd["prepare"]
    assert four.seconds == one.seconds


def test_spot_pays_for_what_it_loses() -> None:
    """Twenty hours between preemptions; each costs half of 600 s and a restart of 324 s."""
    spot = bill(offer(), cpu(), spot=True)
    share = (300 + 324) / (20 * HOUR)
    work = 36000 + 60 + 24 + 100 + 122
    assert spot.seconds["lost"] == pytest.approx(work * share / (1 - share))
    assert spot.usd["train"] == pytest.approx(10 * 18.0)
    assert any(note.startswith("spot_expected: a preemption every 20 h") for note in spot.notes)
    eight = bill(offer(), cpu(), spot=True, nodes=8)
    assert eight.seconds["lost"] > 8 * spot.seconds["lost"]  # any of eight stops all of them


def test_a_spot_run_without_a_save_on_the_way_loses_half_of_itself() -> None:
    never = bill(offer(), cpu(), spot=True, train_seconds=HOUR, save_every_seconds=math.inf)
    share = (1800 + 324) / (20 * HOUR)
    assert never.seconds["save"] == 2.0  # the last one
    assert never.seconds["lost"] == pytest.approx((3600 + 184 + 2) * share / (1 - share))


def test_spot_on_far_too_many_machines_is_dear_but_finite() -> None:
    crowd = bill(offer(), cpu(), spot=True, nodes=1000)
    assert math.isfinite(crowd.total_usd)
    assert crowd.seconds["lost"] > 10 * crowd.seconds["train"]


def test_preparation_takes_the_machine_that_does_it_for_the_least() -> None:
    small, large = cpu(instance_type="small", vcpus=2.0, usd_per_hour=0.20), cpu()
    assert bill(offer(), small, large).notes == ("prepare_on: aws cpu",)
    part = replace(cpu(), instance_type="t3", usd_per_hour=0.01, notes=("burstable",))
    assert bill(offer(), part, large).notes == ("prepare_on: aws cpu",)
    elsewhere = cpu(instance_type="far", usd_per_hour=0.01, region="eu-west-1")
    assert bill(offer(), elsewhere, large).notes == ("prepare_on: aws cpu",)
    assert "far in eu-west-1" in bill(offer(), elsewhere).notes[0]
    other_cloud = cpu(cloud="gcp", usd_per_hour=0.01)
    assert bill(offer(), other_cloud).notes[0].startswith("prepare_on_gpu")


def test_preparing_on_the_gpu_machine_is_dearer_and_said() -> None:
    lonely = bill(offer())
    assert lonely.usd["prepare"] == pytest.approx((120 + 500) * 36 / 3600)  # 16 vCPUs count
    assert lonely.notes[0].startswith("prepare_on_gpu: no CPU machine of aws")
    assert lonely.usd["prepare"] > bill(offer(), cpu()).usd["prepare"]


def test_ones_own_machine_has_no_boot_no_storage_and_no_egress() -> None:
    mine = bill(own_machine(0.40, vcpus=2))
    for phase in ("provision", "install", "data_wait", "idle", "store", "egress"):
        assert mine.usd[phase] == 0
    assert mine.seconds["prepare"] == pytest.approx(6e9 / 1.5e6)
    assert mine.notes == ()


def test_a_long_run_stores_for_as_long_as_it_runs() -> None:
    long = bill(offer(), cpu(), train_seconds=1460 * HOUR)
    assert long.training_seconds > 2 * 730 * HOUR
    assert long.seconds["store"] == pytest.approx(long.training_seconds)


def test_unknown_prices_are_assumed_aloud() -> None:
    notes = bill(offer(cloud="moon"), cpu(cloud="moon")).notes
    assert any(n.startswith("store_assumed: moon") and "$0.023" in n for n in notes)
    assert any(n.startswith("egress_assumed: moon") and "$0.09" in n for n in notes)


def test_shards_and_preparation() -> None:
    assert shard_bytes(100, vocab_size=65536) == 200
    assert shard_bytes(100, vocab_size=65537) == 400
    two, four = (preparation_seconds(10**9, vcpus=v) for v in (2, 4))
    assert (two, four) == pytest.approx((1e9 / 1.5e6, 1e9 / 3e6))
    assert preparation_seconds(10**9, vcpus=16, file_bytes=20e9) == 200  # the hub is slower
    assert preparation_seconds(10**9, vcpus=16) == preparation_seconds(10**9, vcpus=96)
    assert egress_usd(100, usd_per_gb=0.12) == pytest.approx(12.0)


def test_no_price_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"p5e\.48xlarge has no on-demand price.*usd_per_hour"):
        bill(find(price_book(), "p5e.48xlarge"))
    with pytest.raises(UserError, match="save every 0 s"):
        bill(offer(), save_every_seconds=0.0)


# ---------------------------------------------------------------- properties


def drawn(seed: int) -> tuple[random.Random, dict[str, object]]:
    dice = random.Random(seed)
    return dice, {
        "spot": dice.random() < 0.5,
        "nodes": dice.choice([1, 2, 8, 64]),
        "tokens_to_prepare": dice.randrange(10**12),
        "vocab_size": dice.choice([256, 50257, 128256]),
        "save_seconds_each": dice.uniform(0, 60),
        "save_every_seconds": dice.choice([60.0, 600.0, 3600.0, 1e5, math.inf]),
        "eval_seconds": dice.uniform(0, 1000),
    }


@pytest.mark.parametrize("seed", range(200))
def test_affordable_seconds_are_the_inverse_of_the_bill(seed: int) -> None:
    dice, asked = drawn(seed)
    machine = offer(cloud=dice.choice(["aws", "moon", "local"]))
    seconds = 10 ** dice.uniform(0, 6.5)
    there = bill(machine, cpu(), train_seconds=seconds, **asked)  # type: ignore[arg-type]
    back = affordable_train_seconds(machine, usd=there.training_usd, **asked)  # type: ignore[arg-type]
    assert back == pytest.approx(seconds, abs=1.0)


def test_too_little_money_leaves_no_training_and_a_free_machine_no_end() -> None:
    _, asked = drawn(0)
    assert affordable_train_seconds(offer(), usd=1.0, **asked) == 0  # type: ignore[arg-type]
    free = offer(usd_per_hour=0.0, spot_usd_per_hour=0.0)
    assert affordable_train_seconds(free, usd=1.0, **asked) == math.inf  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_dollars_grow_with_hours(seed: int) -> None:
    _, asked = drawn(seed)
    bills = [
        bill(offer(), cpu(), train_seconds=10 ** (k / 4), **asked)  # type: ignore[arg-type]
        for k in range(26)
    ]
    for less, more in itertools.pairwise(bills):
        assert more.training_usd > less.training_usd
        assert more.total_usd > less.total_usd


def test_every_offer_of_the_package_can_be_priced() -> None:
    book = price_book()
    for machine in book.offers:
        for spot in (False, True):
            if machine.price(spot=spot) is None:
                continue
            one = bill(machine, *book.offers, spot=spot)
            assert one.total_usd > one.usd["train"] > 0
            assert all(usd >= 0 for usd in one.usd.values())


def test_phases_are_those_of_the_ledger() -> None:
    assert set(TRAINING_PHASES) | set(module._BESIDE) == set(PHASES.split())
