"""From the planner's options to stages on machines: by hand, and by what must hold of them all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from launches import planned

from tuppence.cloud import clouds, machines, scoring
from tuppence.cloud.beside import beside
from tuppence.cloud.deciding import from_chosen
from tuppence.cloud.launch import Stage
from tuppence.cloud.machines import candidates, rented, stages_of, words_of
from tuppence.config import override
from tuppence.errors import DoesNotFit, UserError
from tuppence.plan.bill import tokens_to_prepare
from tuppence.plan.gpus import gpus
from tuppence.plan.market import Seller
from tuppence.plan.offers import Offer
from tuppence.plan.preparation import preparation_seconds, preparing
from tuppence.plan.prices import Book, price_book
from tuppence.planning import Planned

LLMC = "llmc_gpt2_124m"
EIGHT = ("machine.gpu=A100-40GB", "machine.gpu_count=8", "machine.spot=off")


def offer(**values: Any) -> Offer:
    plain = Offer(
        cloud="aws", instance_type="p4d.24xlarge", accelerator="A100", gpu="A100-40GB-SXM4",
        gpu_count=8, vcpus=96, memory_gib=1152, usd_per_hour=20.0, spot_usd_per_hour=None,
        region="us-east-1", date="2026", source="SkyPilot catalog",
    )  # fmt: skip
    return replace(plain, **values)


def cpu(**values: Any) -> Offer:
    """Eight cores at 36 cents: a ten-thousandth of a dollar each second."""
    machine = {"instance_type": "c5.2xlarge", "accelerator": "", "gpu": None, "gpu_count": 0}
    small = {"vcpus": 8.0, "memory_gib": 16.0, "usd_per_hour": 0.36}
    return offer(**(machine | small | values))


def found(*offers: Offer, words: tuple[str, ...] = ()) -> Planned:
    return planned([LLMC, *words], Book(offers, ()))


def stages(plan: Planned, **asked: Any) -> tuple[Stage, ...]:
    return stages_of(plan.run, plan.data, plan.book, plan.options, **asked)


def chosen(plan: Planned, **asked: Any) -> list[str]:
    """Instance types of the candidates."""
    every = candidates(plan.run, plan.data, plan.book, plan.options, **asked)
    return [option.seller.offer.instance_type for option in every]


# ---------------------------------------------------------------- candidates


def test_runners_up_are_other_machines_in_the_planners_order() -> None:
    """Not the same one elsewhere, none much dearer, none on other terms, three in all."""
    plan = found(
        offer(),
        offer(region="us-west-2", usd_per_hour=21.0),
        offer(instance_type="dear", accelerator="V100", gpu="V100-16GB-SXM2", usd_per_hour=90.0),
        offer(cloud="lambda", instance_type="gpu_8x_a100", usd_per_hour=22.0),
        offer(cloud="nebius", instance_type="n", usd_per_hour=23.0),
        offer(cloud="gcp", instance_type="a2-highgpu-8g", usd_per_hour=24.0),
        offer(cloud="oci", instance_type="o", usd_per_hour=25.0, spot_usd_per_hour=20.5),
    )
    assert chosen(plan) == ["p4d.24xlarge", "gpu_8x_a100", "n"]
    assert chosen(plan, most=9) == ["p4d.24xlarge", "gpu_8x_a100", "n", "a2-highgpu-8g", "o"]
    spots = [
        o.seller.spot for o in candidates(plan.run, plan.data, plan.book, plan.options, most=9)
    ]
    assert not any(spots)


@pytest.mark.parametrize(("price", "count"), [(29.0, 2), (31.0, 1)])
def test_a_runner_up_costs_at_most_half_as_much_again(price: float, count: int) -> None:
    plan = found(offer(), offer(cloud="lambda", instance_type="other", usd_per_hour=price))
    assert len(chosen(plan)) == count


@pytest.mark.parametrize(("price", "count"), [(29.0, 2), (32.0, 1)])
def test_for_the_same_dollars_it_does_two_thirds_as_much(price: float, count: int) -> None:
    """Under a budget of dollars all machines cost the same, and dear ones train less."""
    other = offer(cloud="lambda", instance_type="other", usd_per_hour=price)
    plan = found(offer(), other, words=("budget.usd=100",))
    assert len(chosen(plan)) == count


@pytest.mark.parametrize(("cards", "count"), [(4, 2), (1, 1)])
def test_a_run_that_was_meant_for_an_evening_does_not_take_a_week(cards: int, count: int) -> None:
    """Machines of fewer cards at 1.3 times the price of a card: as dear, but much slower."""
    less = offer(instance_type="less", gpu_count=cards, cloud="lambda", usd_per_hour=1.3 * cards)
    plan = found(offer(usd_per_hour=8.0), less)
    first, second = (option.usd for option in plan.options)
    assert first is not None
    assert second is not None
    assert second.mid < machines.WORSE * first.mid
    assert chosen(plan)[0] == "p4d.24xlarge"
    assert len(chosen(plan)) == count


def test_for_the_same_hours_it_does_two_thirds_as_much() -> None:
    """A machine that is small and cheap for what it does would end far from where the plan ends."""
    small = offer(instance_type="small", gpu_count=4, cloud="lambda", usd_per_hour=12.0)
    large = offer(instance_type="large", gpu_count=8, cloud="lambda", usd_per_hour=22.0)
    plan = found(offer(usd_per_hour=19.0), small, large, words=("budget.hours=2",))
    assert chosen(plan) == ["p4d.24xlarge", "large"]


def test_all_candidates_train_the_same_model_with_the_same_batch() -> None:
    """Where the size is free each machine has its own best one: runners-up get the choice's."""
    plan = planned(["auto", "data.source=fineweb_10bt", "machine.spot=off"], price_book())
    every = candidates(plan.run, plan.data, plan.book, plan.options, most=99)
    taken = {option.seller for option in every}
    own = {(o.work.depth, o.work.recipe.batch_tokens) for o in plan.options if o.seller in taken}
    assert len(own) > 1
    assert len({(o.work.depth, o.work.recipe.batch_tokens) for o in every}) == 1
    sized = override(plan.run, list(words_of(plan.run, every[0])))
    assert sized.model.depth == every[0].work.depth
    assert sized.train.batch_tokens == every[0].work.recipe.batch_tokens
    assert words_of(sized, every[0]) == ()


def test_what_skypilot_cannot_do_is_no_choice() -> None:
    """Its managed jobs need machines that end themselves, and some clouds join no machines."""
    verda = offer(cloud="verda", instance_type="8A100.176V", usd_per_hour=5.0)
    runpod = offer(cloud="runpod", instance_type="8x_A100", usd_per_hour=10.0)
    plan = found(verda, runpod, offer())
    assert plan.options[0].seller.offer.cloud == "verda"
    assert chosen(plan)[0] == "8x_A100"
    assert chosen(found(verda, runpod, offer(), words=("machine.nodes=2",))) == ["p4d.24xlarge"]
    with pytest.raises(UserError, match=r"no managed job on verda.*machine\.cloud"):
        chosen(found(verda))


def test_a_cloud_without_credentials_is_no_choice() -> None:
    plan = found(offer(), offer(cloud="lambda", instance_type="gpu_8x_a100", usd_per_hour=22.0))
    assert chosen(plan, clouds=frozenset({"lambda"})) == ["gpu_8x_a100"]
    with pytest.raises(UserError, match=r"no credentials .*\(aws, lambda\).*sky check"):
        chosen(plan, clouds=frozenset({"gcp"}))


def test_what_does_not_fit_is_said_as_the_plan_says_it() -> None:
    plan = found(offer())
    none = [replace(option, why_not="needs 300 GiB") for option in plan.options]
    with pytest.raises(DoesNotFit, match="needs 300 GiB"):
        candidates(plan.run, plan.data, plan.book, none)


def test_a_machine_of_ones_own_is_not_rented() -> None:
    words = ("machine.cloud=local", "machine.gpu=A100", "machine.usd_per_hour=1")
    with pytest.raises(UserError, match="--ssh"):
        chosen(found(offer(), words=words))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "A100"),
        ({"accelerator": "a100-80gb", "gpu": "A100-80GB-SXM4", "source": "own"}, "A100-80GB"),
        ({"accelerator": "4090", "gpu": "RTX-4090-24GB", "source": "own"}, "RTX4090"),
        ({"accelerator": "H100-PCIe", "gpu": "H100-80GB-PCIe", "source": "own"}, "H100"),
        (
            {"accelerator": "NVIDIA A10G", "gpu": "A10G-24GB", "source": "own", "cloud": "quoted"},
            "A10G",
        ),
        ({"gpu": "H100-80GB-SXM5", "source": "", "cloud": "runpod"}, "H100-SXM"),
        ({"accelerator": "a100big", "cloud": "slurm", "source": "own"}, "a100big"),
        ({"accelerator": "Brandnew", "gpu": None}, "Brandnew"),
    ],
)  # fmt: skip
def test_a_card_goes_by_skypilots_name(values: Any, name: str) -> None:
    """The catalog's own and a cluster's as they are; what a person wrote by its card."""
    assert clouds.accelerator_of(offer(**values)) == name


def test_a_card_that_skypilot_does_not_rent_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"H800-80GB-SXM5.*the nearest are .*H100-SXM"):
        clouds.accelerator_of(offer(accelerator="H800-80GB-SXM5", gpu="H800-80GB-SXM5", source=""))


def test_every_card_of_the_table_of_names_is_one_of_ours() -> None:
    named = {*clouds._CARDS, *(card for _, card in clouds._CARDS_ON)}
    assert named <= set(gpus())
    assert {*clouds._CARDS.values(), *clouds._CARDS_ON.values()} <= set(clouds.NAMES)


def test_every_machine_of_the_price_book_has_a_name_and_a_place() -> None:
    """GPU machines that can be rented; a row that only describes a machine names no type."""
    for each in price_book().offers:
        if each.gpu_count and each.has_price:
            machine = rented(Seller(each, False, 1.0, ""))
            assert machine.accelerator in clouds.NAMES, each
            assert machine.cloud == each.cloud
            assert machine.instance_type is None or " " not in machine.instance_type


def test_a_quoted_machine_has_no_cloud_and_no_type() -> None:
    words = ("machine.gpu=H100-PCIe", "machine.gpu_count=8", "machine.usd_per_hour=32")
    (stage,) = stages(found(cpu(), words=words), wanted=("train",))
    (machine,) = stage.machines
    assert (machine.cloud, machine.region, machine.instance_type) == (clouds.ANY, None, None)
    assert (machine.accelerator, machine.gpu_count) == ("H100", 8)
    assert machine.usd_per_hour == 32.0


def test_a_cluster_may_be_named_with_the_cloud() -> None:
    own = offer(cloud="slurm/lab", region="", instance_type="A100-40GB-SXM4", source="own")
    machine = rented(Seller(own, False, 12.0, "your price"))
    assert (machine.cloud, machine.region, machine.instance_type) == ("slurm", "lab", None)


# ---------------------------------------------------------------- one task or two


def test_preparation_by_hand() -> None:
    """10B tokens on eight cores at 36 cents: boot, environment, download or tokens; 8 A100 at $20
    would wait for it."""
    plan = found(offer(), cpu())
    first, second = stages(plan)
    assert plan.options[0].tokens is not None
    tokens = tokens_to_prepare(plan.data, plan.options[0].tokens.mid)
    seconds = 120 + 120 + preparation_seconds(tokens, vcpus=8)
    assert (first.name, first.does, first.nodes) == ("prepare", ("prepare",), 1)
    assert first.seconds == pytest.approx(seconds)
    assert first.usd == pytest.approx(seconds / 10_000)
    assert first.machines[0].instance_type == "c5.2xlarge"
    assert first.machines[0].accelerator is None
    assert (second.name, second.does) == ("train", ("train",))
    bill = plan.options[0].stages
    assert bill is not None
    assert second.usd == pytest.approx(bill.training_usd)
    assert second.seconds == pytest.approx(bill.training_seconds)


def test_one_task_by_hand() -> None:
    """What the eight GPUs would cost meanwhile, without a second boot."""
    plan = found(offer(), cpu())
    (stage,) = stages(plan, apart=False)
    bill, option = plan.options[0].stages, plan.options[0]
    assert bill is not None
    assert option.tokens is not None
    tokens = tokens_to_prepare(plan.data, option.tokens.mid)
    more = 120 + preparation_seconds(tokens, vcpus=96)
    assert stage.does == ("prepare", "train")
    assert stage.seconds == pytest.approx(bill.training_seconds + more)
    assert stage.usd == pytest.approx(bill.training_usd + more * 20 / 3600)


SMALL = ("machine.gpu=A10G", "budget.steps=100", "data.max_tokens=100_000_000")


@pytest.mark.parametrize(
    ("price", "asked", "does"),
    [
        (20.0, {}, [("prepare",), ("train",)]),
        (0.36, {}, [("prepare", "train")]),  # as cheap as the other, and one boot less
        (0.36, {"apart": True}, [("prepare",), ("train",)]),
        (20.0, {"apart": False}, [("prepare", "train")]),
        (20.0, {"prepared": True}, [("train",)]),
        (20.0, {"wanted": ("train",)}, [("train",)]),
        (20.0, {"wanted": ("prepare",)}, [("prepare",)]),
    ],
)
def test_two_tasks_where_they_are_cheaper(price: float, asked: Any, does: Any) -> None:
    plan = found(offer(usd_per_hour=price, gpu_count=1, vcpus=8), cpu())
    assert [stage.does for stage in stages(plan, **asked)] == does


def test_the_decision_is_the_cheaper_of_the_two_by_a_nickel() -> None:
    """Over prices of the GPU machine from cents to tens of dollars, also for seconds of work."""
    for words in ((), ("budget.steps=20",), ("budget.steps=20", "train.batch_tokens=8192")):
        for price in (0.1, 0.4, 0.7, 1.0, 1.5, 3.0, 10.0, 30.0):
            plan = found(offer(usd_per_hour=price), cpu(), words=words)
            two, one = (stages(plan, apart=apart) for apart in (True, False))
            saved = sum(s.usd for s in one) - sum(s.usd for s in two)
            assert len(stages(plan)) == (2 if saved > machines.APART_USD else 1), (words, price)


def test_an_environment_that_is_there_takes_no_time() -> None:
    plan = found(offer(), cpu())
    for apart in (True, False):
        slow, fast = (stages(plan, apart=apart, built=built) for built in (False, True))
        seconds = sum(s.seconds for s in slow) - sum(s.seconds for s in fast)
        assert seconds == pytest.approx(machines.ENVIRONMENT_SECONDS)


def test_several_nodes_do_not_wait_for_one_that_prepares() -> None:
    words = ("machine.nodes=2", "budget.steps=20")
    plan = found(offer(usd_per_hour=0.1), cpu(), words=words)
    first, second = stages(plan)
    assert (first.does, first.nodes) == (("prepare",), 1)
    assert (second.does, second.nodes) == (("train",), 2)
    first, _ = stages(found(offer(usd_per_hour=0.1), words=words))  # no CPU machine is known
    assert (first.does, first.nodes) == (("prepare",), 1)
    assert first.machines[0].accelerator == "A100"


def test_a_machine_of_its_own_that_nobody_sells_is_refused() -> None:
    with pytest.raises(UserError, match="no CPU machine"):
        stages(found(offer()), apart=True)


def test_a_budget_of_dollars_covers_preparation_on_the_training_machine() -> None:
    plan = found(offer(), cpu(), words=("budget.usd=30",))
    (one,) = stages(plan, apart=False)
    assert one.usd == 30.0
    assert one.seconds == pytest.approx(30 / 20 * 3600)


def test_a_cluster_prepares_on_some_of_its_cores() -> None:
    words = ("machine.cloud=slurm", "machine.gpu=A100", "machine.gpu_count=8")
    first, second = stages(found(offer(), words=(*words, "machine.usd_per_hour=32")))
    (part,) = first.machines
    assert (part.cloud, part.accelerator, part.vcpus) == ("slurm", None, 8.0)
    assert part.usd_per_hour == 8.0  # 8 cores of the 32 that eight GPUs are taken to have
    assert second.machines[0].accelerator == "A100"


def test_disks_hold_what_the_plan_says() -> None:
    plan = found(offer(), cpu(), words=("machine.disk_gb=270",))
    assert stages(plan, wanted=("train",))[0].disk_gb == 320
    assert stages(found(offer()), wanted=("train",))[0].disk_gb == 100


def test_the_preparing_machines_are_those_that_the_plan_priced() -> None:
    """One function prices them for both."""
    book = Book((offer(), cpu(), cpu(instance_type="big", vcpus=64.0, usd_per_hour=3.0)), ())
    best, other = preparing(offer(), 10**9, book=book, usd_per_hour=20.0)
    assert best.machine is not None
    assert best.machine.instance_type == "c5.2xlarge"
    assert best.note(offer()) == "prepare_on: aws c5.2xlarge"
    assert best.usd < other.usd
    plan = planned([LLMC], book)
    bill = plan.options[0].stages
    assert bill is not None
    assert bill.notes[0] == best.note(offer())


# ---------------------------------------------------------------- evaluation


ALL = ("prepare", "train", "eval")


def test_evaluation_goes_where_it_is_cheaper() -> None:
    """Eight A100 at $20 ask in fp32 at 156 TFLOPS: an L4 at 80 cents does a fifth of that."""
    l4 = offer(
        instance_type="g6.xlarge", accelerator="L4", gpu="L4-24GB", gpu_count=1, usd_per_hour=0.8,
    )  # fmt: skip
    for price, count in ((0.8, 3), (40.0, 2)):
        plan = found(offer(), cpu(), replace(l4, usd_per_hour=price), words=EIGHT)
        every = stages(plan, wanted=ALL, tasks="core")
        assert len(every) == count
        assert every[-1].does == (("eval",) if count == 3 else ("train", "eval"))
    here = scoring.here(plan.options[0], plan.data, "core", alone=False)
    assert every[-1].usd == pytest.approx(stages(plan)[-1].usd + here.usd)


def test_evaluation_by_hand() -> None:
    """tokens x FLOPs / 3 / (0.4 x 19.5 TFLOPS x 8)."""
    plan = found(offer(), words=EIGHT)
    option = plan.options[0]
    tokens = scoring.tokens_of("bpb", plan.data, context=1024)
    assert tokens == plan.data.val_tokens
    here = scoring.here(option, plan.data, "bpb", alone=False)
    flops = option.work.shape.flops_per_token / 3
    assert here.seconds == pytest.approx(60 + tokens * flops / (0.4 * 19.5e12 * 8))
    assert here.usd == pytest.approx(here.seconds * 20 / 3600)
    alone = scoring.here(option, plan.data, "bpb", alone=True)
    assert alone.seconds == pytest.approx(here.seconds + 240)


def test_a_card_that_is_too_small_judges_nothing() -> None:
    plan = found(offer(), words=EIGHT)
    option = plan.options[0]
    seller = Seller(offer(gpu_count=1, gpu="L4-24GB"), False, 0.8, "")
    assert len(scoring.on_one_gpu(option, plan.data, "core", [seller])) == 1
    large = replace(option.work.shape, params_lookup=6_000_000_000)
    option = replace(option, work=replace(option.work, shape=large))
    assert scoring.on_one_gpu(option, plan.data, "core", [seller]) == ()


def test_more_tasks_take_longer_and_unknown_ones_are_refused() -> None:
    data = found(offer()).data
    sizes = [scoring.tokens_of(t, data, context=1024) for t in ("hellaswag", "core")]
    assert sizes[0] < sizes[1]
    assert scoring.tokens_of("hellaswag,core", data, context=1024) == pytest.approx(sum(sizes))
    with pytest.raises(UserError, match="did you mean hellaswag"):
        scoring.tokens_of("helaswag", data, context=1024)


def test_stages_of_every_recipe_add_up() -> None:
    """On the whole price book: the bill's training phases, whatever the machines."""
    for words in ([LLMC], ["nanogpt_4b_tokens"], ["gpt2_124m", "data.source=openwebtext"]):
        plan = planned(words, price_book())
        every = stages(plan)
        first = candidates(plan.run, plan.data, plan.book, plan.options)[0]
        assert first.stages is not None
        train = every[-1]
        assert train.usd >= first.stages.training_usd - 1e-9
        assert train.machines[0] == rented(first.seller)
        assert all(stage.usd > 0 for stage in every)
        assert all(stage.seconds > 0 for stage in every)


# ---------------------------------------------------------------- beside the machines


def test_what_leaves_the_stores_cloud_is_priced_there() -> None:
    """From S3 a machine of another cloud reads shards and environment; one of AWS reads for
    nothing, and writes for nothing; one's own folder costs nothing."""
    elsewhere = {"cloud": "nebius", "region": "eu-north1"}
    plan = found(offer(**elsewhere), cpu(**elsewhere), words=("budget.usd=20",))
    option = plan.options[0]
    every = stages(plan)
    assert [stage.name for stage in every] == ["prepare", "train"]
    assert option.tokens is not None
    tokens = tokens_to_prepare(plan.data, option.tokens.mid)
    checkpoint = option.work.checkpoint_bytes / 1e9
    usd = beside("s3://b/t", every, option, plan.data)
    assert usd["egress"] == pytest.approx(0.09 * (2 * tokens / 1e9 + 3.0 + checkpoint))
    stored = 2 * tokens / 1e9 + 2 * checkpoint
    assert usd["store"] == pytest.approx(0.023 * stored * 0.25)
    assert beside("/folder", every, option, plan.data) == {"store": 0.0, "egress": 0.0}
    near = found(offer(), cpu(), words=("budget.usd=20",))
    assert near.options[0].work == option.work
    usd = beside("s3://b/t", stages(near), near.options[0], near.data)
    assert usd["egress"] == pytest.approx(0.09 * checkpoint)


def test_what_is_written_to_another_clouds_store_is_priced_where_it_leaves() -> None:
    """Google's bucket at 12 cents, AWS's machines at 9: shards out and in, checkpoints as saved."""
    plan = found(offer(), cpu(), words=("budget.usd=20",))
    option = plan.options[0]
    assert option.stages is not None
    assert option.tokens is not None
    shards = 2 * tokens_to_prepare(plan.data, option.tokens.mid) / 1e9
    read = shards + 3.0 + option.work.checkpoint_bytes / 1e9
    written = shards + option.stages.seconds["save"]  # at 1 GB a second
    usd = beside("gs://b/t", stages(plan), option, plan.data)["egress"]
    assert usd == pytest.approx(0.12 * read + 0.09 * written)


# ---------------------------------------------------------------- the table of a launch


def test_the_table_begins_with_the_machine_that_is_taken() -> None:
    """What cannot be rented is left out with its reason; runners-up stand next."""
    verda = offer(cloud="verda", instance_type="8A100.176V", usd_per_hour=5.0)
    west = offer(region="us-west-2", usd_per_hour=20.5)  # of the same machine: no runner-up
    other = offer(cloud="lambda", instance_type="gpu_8x_a100", usd_per_hour=22.0)
    plan = found(verda, offer(), west, other, replace(verda, usd_per_hour=50.0, region="x"))
    taken = stages(plan, wanted=("train",))[0].machines
    left, out = from_chosen(plan.options, taken)
    told = [(option.seller.offer.cloud, option.seller.offer.region) for option in left]
    assert told == [("aws", "us-east-1"), ("lambda", "us-east-1"), ("aws", "us-west-2")]
    ((why, count),) = out.items()
    assert "verda" in why
    assert count == 1
