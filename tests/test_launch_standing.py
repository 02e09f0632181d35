"""What a launch has cost and will cost, and when it is ended from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_sky
import pytest

from tuppence.cloud import cap, standing, standing_text
from tuppence.cloud.launch import Launch, Rented, Stage
from tuppence.cloud.record import Job as Asked
from tuppence.cloud.record import Record
from tuppence.cloud.sky import Cluster, Cost, Job, Look
from tuppence.cloud.standing import Inside, Standing
from tuppence.config import Budget, Interval

NOW = 1e9 + 3600.0
CPU = Rented("aws", None, "m6i.2xlarge", None, 0, 8, 32, False, 0.4, "book")
A100 = Rented("aws", "us-east-1", "p4d.24xlarge", "A100", 8, 96, 1152, True, 20.0, "book")
H100 = replace(A100, cloud="lambda", instance_type="gpu_8x_h100", accelerator="H100", region=None)
PREPARE = Stage("prepare", ("prepare",), (CPU,), 1, 600.0, 0.1, 50)
TRAIN = Stage("train", ("train",), (A100, replace(H100, usd_per_hour=30.0)), 1, 7200.0, 40.0, 50)
LAUNCH = Launch(
    version=1,
    name="tiny",
    words=("shakespeare",),
    store="/nowhere",
    stages=(PREPARE, TRAIN),
    budget=Budget(usd=40.0),
    kit="k",
    python=None,
    image=None,
    tasks=None,
    secrets=(),
    usd=Interval(38.0, 40.5, 45.0),
    phases={"prepare": 0.1, "train": 39.0},
    prices_from="book",
)
RECORD = Record(1, "sky", "started", LAUNCH, 1e9, jobs=(Asked("tiny-abc123", 1, 1e9),))
INSIDE = Inside("running", "", 100, 0.4, 3.2, 15.0, 20.0, NOW - 10, 4000.0)


def job(**given: Any) -> Job:
    return Job(**fake_sky.job(**given))


def prepared(**given: Any) -> Job:
    row = {"task": "tiny-prepare", "status": "SUCCEEDED", "machine": "1x(cpus=8, ...)"}
    return job(**row, start_at=1e9, end_at=1e9 + 600, **given)


def cost(*args: Any, **given: Any) -> Cost:
    row = fake_sky.cost(*args, **given)
    return Cost(**{**row, "intervals": tuple(tuple(each) for each in row["intervals"])})


def look(*jobs: Job, costs: tuple[Cost, ...] = (), held: tuple[str, ...] = ()) -> Look:
    clusters = tuple(Cluster(**fake_sky.cluster(name)) for name in held)
    return Look(jobs, clusters, (), costs)


def stand(seen: Look, inside: Inside | None = None, record: Record = RECORD) -> Standing:
    return standing.standing(record, seen, inside, now=NOW)


def of_train(seen: Look, inside: Inside | None = None) -> standing.StageStanding:
    return stand(seen, inside).stages[1]


TRAINING = job(task_id=1)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize(
    ("statuses", "state", "stage"),
    [
        (("PENDING", "PENDING"), "starting", "prepare"),
        (("STARTING", "PENDING"), "starting", "prepare"),
        (("RUNNING", "PENDING"), "running", "prepare"),
        (("SUCCEEDED", "STARTING"), "starting", "train"),
        (("SUCCEEDED", "RECOVERING"), "recovering", "train"),
        (("SUCCEEDED", "CANCELLING"), "stopping", "train"),
        (("SUCCEEDED", "SUCCEEDED"), "finished", "train"),
        (("SUCCEEDED", "CANCELLED"), "stopped", "train"),
        (("FAILED", "PENDING"), "failed", "prepare"),
        (("FAILED", "CANCELLED"), "failed", "prepare"),
        (("SUCCEEDED", "FAILED_NO_RESOURCE"), "failed", "train"),
    ],
)
def test_state_and_stage_are_the_newest_job_s(
    statuses: tuple[str, str], state: str, stage: str
) -> None:
    rows = [
        job(task=f"tiny-{name}", task_id=i, status=status)
        for i, (name, status) in enumerate(zip(("prepare", "train"), statuses, strict=True))
    ]
    found = stand(look(*rows))
    assert (found.state, found.stage) == (state, stage)


def test_before_skypilot_knows_the_job_it_is_starting_and_later_lost() -> None:
    fresh = replace(RECORD, jobs=(Asked("tiny-abc123", None, NOW - 30),))
    assert stand(look(), record=fresh).state == "starting"
    assert stand(look(), record=replace(fresh, jobs=())).state == "planned"
    old = replace(RECORD, jobs=(Asked("tiny-abc123", None, NOW - 7200),))
    lost = stand(look(), record=old)
    assert (lost.state, lost.failure) == ("lost", standing.LOST)
    booting = replace(RECORD, jobs=(Asked("tiny-abc123", None, NOW - 1800),))
    assert stand(look(), record=booting).state == "starting"  # the controller's machine, too
    numbered = replace(RECORD, jobs=(Asked("tiny-abc123", 1, NOW - 1800),))
    assert stand(look(), record=numbered).state == "lost"
    told = replace(INSIDE, state="finished")  # the controller's machine has stopped by itself
    assert stand(look(), told, record=numbered).state == "finished"
    assert stand(look(), record=replace(old, state="stopped")).state == "stopped"


def test_a_run_launched_again_stands_as_its_last_job_and_costs_what_both_did() -> None:
    first = job(status="CANCELLED", end_at=1e9 + 900)
    second = job(job_id=7, name="tiny-ffffff", cluster="tiny-train-7")
    costs = (cost("tiny-train-1", 5.0, status=None), cost("tiny-train-7", 2.0))
    found = stand(look(first, second, costs=costs, held=("tiny-train-7",)))
    assert found.state == "running"
    assert found.stages[1].usd == pytest.approx(7.0)


def test_the_one_task_of_a_job_has_the_job_s_name_and_trains() -> None:
    one = replace(RECORD, launch=replace(LAUNCH, stages=(replace(TRAIN, name="all"),)))
    row = job(task="tiny-abc123", cluster="tiny-abc123-1")
    found = stand(look(row, costs=(cost("tiny-abc123-1", 3.0),)), record=one)
    assert (found.state, found.stage, found.stages[0].usd) == ("running", "all", 3.0)
    assert stand(look(row)).stage == "train"


# ---------------------------------------------------------------- cost


def test_the_larger_of_the_two_meters_is_told() -> None:
    seen = look(TRAINING, costs=(cost(usd=12.0),))
    assert of_train(seen).usd == pytest.approx(12.0)
    ledger = replace(INSIDE, alive_at=NOW, usd=15.0)
    assert of_train(seen, ledger).usd == pytest.approx(15.0)
    assert of_train(seen, replace(ledger, usd=3.0)).usd == pytest.approx(12.0)


def test_time_since_the_ledger_s_last_word_is_counted_while_a_machine_is_there() -> None:
    silent = replace(INSIDE, alive_at=NOW - 1800)
    up = look(TRAINING, costs=(cost(usd=1.0),))
    assert of_train(up, silent).inside_usd == pytest.approx(15.0 + 10.0)  # half an hour at $20
    gone = cost(usd=1.0, intervals=[[1e9, NOW - 1700]], status=None)
    found = of_train(look(TRAINING, costs=(gone,)), silent)
    assert found.inside_usd == pytest.approx(15.0 + 100 / 3600 * 20)
    for state in ("finished", "stopped", "failed"):  # its bill is closed
        assert of_train(up, replace(silent, state=state)).inside_usd == pytest.approx(15.0)


def test_a_new_machine_counts_from_its_own_start_at_the_ledger_s_price() -> None:
    silent = replace(INSIDE, alive_at=NOW - 1800)
    old = cost(usd=1.0, intervals=[[1e9, NOW - 1800]], status=None)
    new = cost(usd=1.0, intervals=[[NOW - 360, None]], hash="h2")
    found = of_train(look(job(task_id=1, recoveries=1), costs=(old, new)), silent)
    assert found.inside_usd == pytest.approx(15.0 + 2.0)
    assert found.metered_usd == pytest.approx(2.0)
    assert (found.incarnations, found.recoveries) == (2, 1)


def test_waiting_for_a_machine_is_not_spending() -> None:
    """A spot run that was killed waits for capacity: the meter has an interval for each attempt."""
    dead = replace(INSIDE, state="dead", usd=32.0, alive_at=NOW - 1800)
    first = cost(usd=1.0, intervals=[[1e9, NOW - 1700]], status=None)
    tries = tuple(
        cost(usd=0.4, intervals=[[NOW - at, NOW - at + 70]], status=None, hash=f"h{at}")
        for at in range(300, 1600, 100)
    )
    booting = cost(usd=0.4, intervals=[[NOW - 70, None]], status="INIT", hash="last")
    seen = (first, *tries, booting)
    alone = 32.0 + 100 / 3600 * 20
    for status in ("RECOVERING", "STARTING", "RUNNING"):
        row = job(task_id=1, status=status, recoveries=1)
        assert of_train(look(row, costs=seen), dead).inside_usd == pytest.approx(alone)
        assert not any(act.cancel for act in acts(look(row, costs=seen), dead))
    up = replace(booting, status="UP")
    for status, more in (("RECOVERING", 0.0), ("RUNNING", 70.0)):
        row = job(task_id=1, status=status, recoveries=1)
        found = of_train(look(row, costs=(first, *tries, up)), dead)
        assert found.inside_usd == pytest.approx(alone + more / 3600 * 20)


def test_waiting_is_no_spending_where_only_the_queue_is_seen() -> None:
    """SkyPilot's controller on a machine of its own: no meter of its clusters can be seen here."""
    dead = replace(INSIDE, state="dead", usd=32.0, alive_at=NOW - 1800)
    row = job(task_id=1, status="RECOVERING", recoveries=1, job_duration=1700.0)
    found = of_train(look(row), dead)
    assert found.inside_usd == 32.0
    assert found.metered_usd == pytest.approx((1700 + 2 * 60) / 3600 * 20)  # a boot for each
    again = replace(row, status="RUNNING", recovered_at=NOW - 180)
    assert of_train(look(again), dead).inside_usd == pytest.approx(32.0 + 1.0)


def test_a_recovered_machine_has_its_own_way_down() -> None:
    ledger = replace(INSIDE, alive_at=NOW, usd=40.0 + 200 / 3600 * 20)
    assert any(act.cancel for act in acts(look(TRAINING), ledger))
    assert not any(act.cancel for act in acts(look(replace(TRAINING, recoveries=1)), ledger))


def test_a_meter_of_zero_is_not_believed() -> None:
    seen = look(TRAINING, costs=(cost(usd=0.0, seconds=1800.0, resources="1x(gpus=A100:8, ...)"),))
    assert of_train(seen).usd == pytest.approx(10.0)
    runner_up = replace(seen.costs[0], resources="1x(gpus=H100:8, ...)")
    assert of_train(replace(seen, costs=(runner_up,))).usd == pytest.approx(15.0)
    unknown = replace(seen.costs[0], resources=None)  # the dearest that it may be
    assert of_train(replace(seen, costs=(unknown,))).usd == pytest.approx(15.0)


def test_without_a_meter_the_queue_tells() -> None:
    row = job(task_id=1, submitted_at=NOW - 2000, start_at=NOW - 1800)
    assert of_train(look(row)).usd == pytest.approx((1800 + 200) / 3600 * 20)
    waiting = replace(row, start_at=None, status="STARTING")
    assert of_train(look(waiting)).usd == 0.0
    nodes = replace(LAUNCH, stages=(PREPARE, replace(TRAIN, nodes=2)))
    found = stand(look(row), record=replace(RECORD, launch=nodes))
    assert found.stages[1].usd == pytest.approx(2 * 2000 / 3600 * 20)


def test_forecast_is_what_was_paid_what_is_left_and_what_is_planned() -> None:
    seen = look(prepared(), TRAINING, costs=(cost("tiny-prepare-1", 0.2), cost(usd=14.0)))
    at_end = INSIDE.usd + 10 / 3600 * 20 + 4000 / 3600 * 20  # paid, since its last word, to come
    rest = 40.5 - 40.1  # storage and egress, as planned
    assert stand(seen, INSIDE).forecast_usd == pytest.approx(0.2 + at_end + rest)
    assert stand(seen).forecast_usd == pytest.approx(0.2 + 40.0 + rest)  # as planned
    over = look(prepared(), job(task_id=1, status="SUCCEEDED"), costs=seen.costs)
    assert stand(over).forecast_usd == pytest.approx(14.2)


def test_machine_price_and_region_are_those_that_were_got() -> None:
    row = job(task_id=1, cloud="Lambda", region="us-west-2", machine="1x(gpus=H100:8, ...)")
    found = of_train(look(row))
    assert (found.machine, found.region) == ("lambda gpu_8x_h100 H100:8", "us-west-2")
    assert found.usd_per_hour == 30.0
    held = Cluster(**fake_sky.cluster(usd_per_hour=33.0))
    assert of_train(Look((row,), (held,), (), ())).usd_per_hour == 33.0
    waiting = stand(look(prepared())).stages[1]
    assert (waiting.machine, waiting.region) == ("aws p4d.24xlarge A100:8", "us-east-1")


# ---------------------------------------------------------------- why it failed


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        ("FAILED_NO_RESOURCE", "Failed to acquire resources", "no capacity for aws A100:8, lambda"),
        ("FAILED_NO_RESOURCE", "VcpuLimitExceeded: vCPU quota", "quota refused for aws A100:8"),
        ("FAILED_PRECHECKS", "no credentials", "SkyPilot refused aws A100:8"),
        ("FAILED_SETUP", "Setup failed", "the machine's set-up failed"),
        ("FAILED_CONTROLLER", "boom", "controller failed: boom"),
        ("FAILED", "Job exited with exit code 124 (user", "exit code 124: the dead-man timer"),
        ("FAILED", "Job exited with exit codes [3, 143] (user", "exit code 3: it does not fit"),
        ("FAILED", "Job failed (FAILED)", "tuppence logs tiny --stage train"),
    ],
)
def test_a_failure_is_one_line_with_the_remedy(status: str, said: str, told: str) -> None:
    row = job(task_id=1, status=status, failure=said)
    found = stand(look(row))
    assert found.state == "failed"
    assert told in found.failure
    assert "\n" not in found.failure


# ---------------------------------------------------------------- the cap


def acts(
    seen: Look, inside: Inside | None = None, launch: Launch = LAUNCH, **more: Any
) -> list[cap.Act]:
    found = standing.standing(replace(RECORD, launch=launch), seen, inside, now=NOW)
    ended = {row.cluster: row.end_at for row in seen.jobs if row.end_at}
    return cap.acts(launch, found, told=more.get("told", ()), ended_at=ended, now=NOW)


def codes(found: list[cap.Act]) -> set[str]:
    return {act.code for act in found}


def test_below_nine_tenths_there_is_nothing_to_tell() -> None:
    ledger = replace(INSIDE, alive_at=NOW, usd=35.9)
    assert acts(look(TRAINING, costs=(cost(usd=20.0),)), ledger) == []
    found = acts(look(TRAINING, costs=(cost(usd=20.0),)), replace(ledger, usd=36.1))
    assert codes(found) == {"near"}
    assert not any(act.cancel for act in found)
    assert acts(look(TRAINING), replace(ledger, usd=36.1), told={found[0].key}) == []


def test_a_trainer_that_ends_at_its_budget_is_left_in_peace() -> None:
    """It uploads, and its machine goes down: SkyPilot's meter is above the budget by then."""
    ended = replace(INSIDE, state="finished", usd=39.6, alive_at=NOW - 100, seconds_left=None)
    assert acts(look(TRAINING, costs=(cost(usd=42.0),)), ended) == []
    last_word = replace(INSIDE, usd=39.6, alive_at=NOW - 110)  # seen through a slow bucket
    assert not any(a.cancel for a in acts(look(TRAINING, costs=(cost(usd=40.5),)), last_word))


def test_a_ledger_beyond_the_budget_is_cancelled_told_or_not() -> None:
    silent = replace(INSIDE, usd=39.0, alive_at=NOW - 600)  # hung: ten minutes are $3.33
    seen = look(TRAINING, costs=(cost(usd=20.0),))
    (found,) = [act for act in acts(seen, silent) if act.cancel]
    assert found.code == "spent"
    assert "$42.33" in found.message
    again = acts(seen, silent, told={found.key})
    assert [act.code for act in again if act.cancel] == ["spent"]


def test_a_machine_that_outlives_the_budget_is_cancelled_whatever_the_ledger_says() -> None:
    allowed = 40.0 + (900 + 120) / 3600 * 20
    inside = replace(INSIDE, usd=10.0, alive_at=NOW)
    assert "outlived" not in codes(acts(look(TRAINING, costs=(cost(usd=allowed - 0.1),)), inside))
    found = acts(look(TRAINING, costs=(cost(usd=allowed + 0.1),)), inside)
    assert [act.code for act in found if act.cancel] == ["outlived"]
    assert [a.code for a in acts(look(TRAINING, costs=(cost(usd=allowed + 0.1),))) if a.cancel]
    # each machine that it had in turn was waited for
    two = (cost(usd=allowed / 2 + 1), cost(usd=allowed / 2 + 1, hash="h2"))
    assert not any(act.cancel for act in acts(look(TRAINING, costs=two), inside))


def test_a_budget_of_hours_is_one_of_dollars_at_the_machine_s_price() -> None:
    launch = replace(LAUNCH, budget=Budget(hours=1.0))
    ledger = replace(INSIDE, usd=20.0 + 0.6, alive_at=NOW)
    assert not any(act.cancel for act in acts(look(TRAINING), ledger, launch))
    found = acts(look(TRAINING), replace(ledger, usd=20.0 + 0.7), launch)
    assert [act.code for act in found if act.cancel] == ["spent"]


def test_a_stage_without_a_budget_in_money_may_cost_three_times_its_plan() -> None:
    launch = replace(LAUNCH, budget=Budget(steps=100))
    for usd, cancelled in ((120.0, False), (126.0, True)):  # $40 planned; $5.67 of allowances
        found = acts(look(TRAINING, costs=(cost(usd=usd),)), INSIDE, launch)
        assert [act.code for act in found if act.cancel] == ["runaway"] * cancelled
    row = job(task="tiny-prepare", machine="1x(cpus=8, ...)")
    for usd, cancelled in ((0.35, False), (0.6, True)):
        bill = cost("tiny-prepare-1", usd)
        seen = look(row, costs=(bill,))
        assert [act.code for act in acts(seen) if act.cancel] == ["runaway"] * cancelled


def test_preparation_on_the_training_machine_is_beside_the_budget() -> None:
    one = replace(TRAIN, does=("prepare", "train"), beside_usd=2.0)
    launch = replace(LAUNCH, stages=(one,))
    bill = cost(usd=40.0 + 3 * 2.0 + (900 + 120) / 3600 * 20 - 0.1)
    assert not any(act.cancel for act in acts(look(TRAINING, costs=(bill,)), INSIDE, launch))
    more = replace(bill, usd=bill.usd + 0.2)
    assert any(act.cancel for act in acts(look(TRAINING, costs=(more,)), INSIDE, launch))


def test_evaluation_on_the_training_machine_is_beside_the_budget() -> None:
    """Planned at $8; the plan's own phases know the trainer's validation only."""
    one = replace(TRAIN, does=("train", "eval"), usd=48.0, beside_usd=8.0)
    launch = replace(LAUNCH, stages=(one,), phases={"train": 39.0, "evaluate": 0.5})
    done = replace(INSIDE, state="finished", usd=39.6, alive_at=NOW - 1500, seconds_left=None)
    for usd, cancelled in ((48.33, False), (40 + 3 * 8 + 1020 / 3600 * 20 + 0.1, True)):
        found = acts(look(TRAINING, costs=(cost(usd=usd),)), done, launch)
        assert [act.code for act in found if act.cancel] == ["outlived"] * cancelled


def test_a_machine_whose_task_is_over_is_taken_down_after_two_minutes() -> None:
    done = job(task_id=1, status="SUCCEEDED", end_at=NOW - 60)
    assert codes(acts(look(done, held=("tiny-train-1",)))) == {"finished"}
    late = replace(done, end_at=NOW - 130)
    found = [act for act in acts(look(late, held=("tiny-train-1",))) if act.down]
    assert [act.down for act in found] == ["tiny-train-1"]
    # one stage's machine while the next stage runs
    before = prepared()
    found = acts(look(before, TRAINING, held=("tiny-prepare-1", "tiny-train-1")))
    assert [act.down for act in found] == ["tiny-prepare-1"]


def test_recovery_and_a_dearer_machine_are_told_once() -> None:
    row = job(task_id=1, recoveries=2)
    held = Cluster(**fake_sky.cluster(usd_per_hour=25.0))
    seen = Look((row,), (held,), (), (cost(usd=1.0),))
    found = acts(seen)
    assert codes(found) == {"recovery", "dearer"}
    assert acts(seen, told={act.key for act in found}) == []
    assert codes(acts(replace(seen, jobs=(replace(row, recoveries=3),)), told=set())) == codes(
        found
    )
    assert not any(act.cancel or act.down for act in found)


# ---------------------------------------------------------------- in words


def test_a_page_has_every_stage_and_what_is_held() -> None:
    seen = look(prepared(), TRAINING, costs=(cost(usd=14.0),), held=("tiny-prepare-1",))
    document: dict[str, Any] = stand(seen, INSIDE).document()
    document |= {"budget": {"usd": 40.0, "hours": None}, "store": "s3://b/t"}
    document["storage"] = {"bytes": 2e9, "usd_per_month": 0.05, "note": ""}
    page = standing_text.page(document)
    assert "running, train on aws p4d.24xlarge A100:8 in us-east-1, spot" in page[0]
    assert "tiny-prepare-1 not down yet" in page[0]
    assert page[1].split()[:2] == ["prepare", "finished"]
    assert page[2].split()[:2] == ["train", "running"]
    text = "\n".join(page)
    for part in ("usd 40", "step 100, 40.0%, val 3.2000, ledger $15.0000", "$0.05 a month"):
        assert part in text
