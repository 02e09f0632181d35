"""`tuppence launch` up to the job and after it: what it refuses, makes, writes and leaves."""

from __future__ import annotations

import dataclasses
import io
import json
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from bucket_places import s3, server
from fake_sky import FakeSky, cluster, error, job

from tuppence import cli, following, guarding, store
from tuppence.cloud import record, store_made
from tuppence.cloud.sky import Sky
from tuppence.config import Budget

__all__ = ["s3", "server"]

AWS = ("shakespeare", "machine.cloud=aws", "machine.gpu=A100", "machine.gpu_count=8")
SLURM = (
    *("shakespeare", "machine.cloud=slurm", "machine.gpu=A100", "machine.gpu_count=1"),
    *("machine.usd_per_hour=1.25", "budget.usd=0.5"),
)
BUDGET = "budget.usd=30"


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def line(self) -> str:
        """The one line of an error."""
        return self.err.strip().splitlines()[-1]


Tuppence = Callable[..., Answer]


@pytest.fixture
def tuppence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Tuppence:
    """A command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(following, "LOOK_SECONDS", 0.0)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Answer:
        code = cli.main(list(words))
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return run


@pytest.fixture
def sky(tmp_path: Path) -> FakeSky:
    return FakeSky(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection fails the test."""

    def connect(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect)


def quotes(planned: Any, first: float | None, others: float = 1.0) -> list[dict[str, Any]]:
    """What machines cost now, a question for each stage: times what is planned; None: not for rent.
    `first` is of the first machine of the training stage."""
    answers = []
    for stage in planned["launch"]["stages"]:
        times = [first if "train" in stage["does"] else 1.0]
        times += [others] * (len(stage["machines"]) - 1)
        rows = [
            {
                "usd_per_hour": None if each is None else each * machine["usd_per_hour"],
                "regions": {},
                "instance_type": None,
                "why": "sold out",
            }
            for machine, each in zip(stage["machines"], times, strict=True)
        ]
        answers.append({"machines": rows})
    return answers


def launched(tmp_path: Path, name: str = "shakespeare") -> record.Record:
    found = record.read(tmp_path / "runs" / name)
    assert found is not None
    return found


def buckets(url: str) -> list[str]:
    """All that the server has."""
    return list(store.Store(url)._fs.ls(""))


# ---------------------------------------------------------------- nothing is made


@pytest.mark.usefixtures("offline")
def test_a_dry_run_shows_all_and_asks_nobody(tuppence: Tuppence, tmp_path: Path) -> None:
    read = tuppence("launch", *AWS, BUDGET, "--dry-run", "--sky", "/none/python")
    assert read.code == 0, read.err
    for part in ("p4d.24xlarge", "expected  $", "budget    $30", "would make  s3://YOUR-BUCKET"):
        assert part in read.out
    told = tuppence("launch", *AWS, BUDGET, "--dry-run", "--store", "s3://mine/t", "--json")
    document = told.document
    assert [task["name"] for task in document["tasks"]][-1] == "shakespeare-train"
    assert document["would_make"][0].startswith("s3://mine")
    assert document["launch"]["store"] == "s3://mine/t"
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("offline")
def test_the_lines_of_the_bill_add_up(tuppence: Tuppence) -> None:
    """Stages, storage and egress are the expected bill; the text shows each."""
    words = ("launch", "llmc_gpt2_124m", "machine.cloud=nebius", "machine.spot=on", "--dry-run")
    words += ("budget.usd=20", "--store", "s3://b/t")
    made = tuppence(*words, "--json").document["launch"]
    parts = [stage["usd"] for stage in made["stages"]]
    parts += [made["phases"]["store"], made["phases"]["egress"]]
    assert sum(parts) == pytest.approx(made["usd"]["mid"])
    assert made["phases"]["egress"] > 1  # S3 to another cloud
    text = tuppence(*words).out
    rows = [line for line in text.splitlines() if line.startswith(("storage  d", "egress  "))]
    assert [row.split()[-1] for row in rows] == [f"{usd:.2f}" for usd in parts[-2:]]
    assert f"expected  ${sum(parts):.2f}" in text


@pytest.mark.usefixtures("offline")
def test_what_shares_the_training_machine_is_said(tuppence: Tuppence) -> None:
    """Preparation takes of the budget, evaluation comes beside it; better machines that cannot be
    rented are named, and the controller's machine."""
    words = ("launch", "llmc_gpt2_124m", "--dry-run", "budget.usd=50", "machine.cloud=azure")
    shared = tuppence(*words).out
    assert "preparation takes about $5.64 of the budget, so about 11% fewer tokens" in shared
    assert "stopped and its disk" in " ".join(shared.split())
    words = ("launch", "llmc_gpt2_124m", "--dry-run", "budget.usd=50", "--tasks", "bpb")
    text = " ".join(tuppence(*words, "machine.spot=on").out.split())
    assert "evaluation after training is beside the budget" in text
    assert "left out" in text
    assert "no managed job on verda" in text
    made = tuppence(*words, "machine.spot=on", "--json").document["launch"]
    assert f"${made['usd']['mid'] - 50:.2f} is expected beside it" in text


@pytest.mark.usefixtures("offline")
def test_a_region_is_planned_at_its_own_price(tuppence: Tuppence) -> None:
    words = ("launch", *AWS, BUDGET, "machine.spot=on", "--dry-run", "--json")
    there = tuppence(*words, "--infra", "aws/us-east-1").document["launch"]
    for stage in there["stages"]:
        for machine in stage["machines"]:
            assert machine["region"] == "us-east-1"
            assert "us-east-1" in machine["price"]
    read = tuppence(*words, "--infra", "aws/nowhere")
    assert read.code == 2
    assert "us-east-1" in read.line


def test_a_dry_run_asks_nothing_of_the_store(tuppence: Tuppence, s3: str) -> None:
    before = buckets(s3)
    read = tuppence("launch", *AWS, BUDGET, "--dry-run", "--store", "s3://another/t")
    assert read.code == 0, read.err
    assert buckets(s3) == before
    there = tuppence("launch", *AWS, BUDGET, "--dry-run", "--store", s3.rpartition("/runs/")[0])
    assert there.code == 0, there.err
    assert not store.Store(s3.rpartition("/runs/")[0]).find()


@pytest.mark.usefixtures("offline")
def test_tasks_are_written_for_those_who_drive_sky(tuppence: Tuppence, tmp_path: Path) -> None:
    words = (*AWS, BUDGET, "--store", "s3://mine/t", "--stages", "prepare,train,eval")
    told = tuppence("launch", *words, "--dry-run", "--json").document
    read = tuppence("launch", *words, "--to-yaml", "out")
    assert read.code == 0, read.err
    folder = tmp_path / "out"
    text = (folder / "shakespeare.yaml").read_text()
    chain = [part for part in yaml.safe_load_all(text) if len(part) > 1]
    assert chain == told["tasks"]
    singles = sorted(path.name for path in folder.glob("shakespeare-*.yaml"))
    assert [yaml.safe_load((folder / name).read_text()) for name in singles] == chain
    (code,) = folder.glob("kit/*/code.tar.gz")
    assert code.parent.name == told["launch"]["kit"]
    with tarfile.open(code) as tar:
        assert "tuppence/cli.py" in tar.getnames()
    readme = (folder / "README.md").read_text()
    assert "aws s3 sync kit s3://mine/t/kit" in readme
    assert "sky jobs launch shakespeare.yaml" in readme
    assert tuppence("launch", *words, "--to-yaml", "out").code == 2  # it is there already


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*AWS, BUDGET), "--store s3://my-bucket/tuppence"),
        (("gpt2_124m", *AWS, "--dry-run"), "one recipe"),
        ((*AWS, "--stages", "trane", "--dry-run"), "did you mean train?"),
        ((*AWS, "--stages", "prepare", "--dry-run"), "a launch trains"),
        ((*AWS, "--stages", "train", "--tasks", "core", "--dry-run"), "add it to --stages train"),
        (("machine.gpu=cpu", "--dry-run"), "tuppence run trains here"),
        (("machine.gpu=A1000", "--dry-run"), "A100"),
        (
            ("machine.gpu=MI300X", "machine.usd_per_hour=2", "budget.usd=50", "--dry-run"),
            "not AMD's",
        ),
        (("machine.cloud=slurm", "--dry-run"), "machine.usd_per_hour="),
        (("machine.cloud=awsome", "--dry-run"), "did you mean aws?"),
        (("--infra", "azur", "--dry-run"), "did you mean azure?"),
        ((*AWS, "--infra", "gcp", "--dry-run"), "name one of the two"),
        ((*AWS, "--runs", "s3://b/runs", "--dry-run"), "a folder here"),
        ((*AWS, "--max-price-rise", "-1", "--dry-run"), "a share"),
        ((*AWS, "--store", "ftp://b/x", "--dry-run"), "s3://BUCKET"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_what_cannot_be_launched_is_one_line(
    tuppence: Tuppence, words: tuple[str, ...], says: str
) -> None:
    read = tuppence("launch", *words)
    assert read.code == 2, read.out
    assert says in read.line


def test_nobody_to_ask_is_no_yes(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    read = tuppence(*words)
    assert read.code == 2
    assert "--yes" in read.line
    assert sky.asked("launch") == []
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "shared").exists()


def test_it_is_asked_once_and_no_is_no(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--detach")
    read = tuppence(*words)
    assert read.code == 2
    assert "nothing was started" in read.line
    assert not (tmp_path / "runs").exists()
    sky.says("launch", {"job_id": 7})
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert tuppence(*words).code == 0
    assert launched(tmp_path).jobs[-1].job_id == 7


# ---------------------------------------------------------------- what can be had, for how much


ON_AWS = ("launch", *AWS, BUDGET, "machine.spot=off", "--store", "shared")


def test_a_dearer_machine_is_refused_with_both_prices(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    sky.says("quote", *quotes(tuppence(*ON_AWS, "--dry-run", "--json").document, 1.275))
    read = tuppence(*ON_AWS, "--yes", "--detach", "--sky", str(sky.python))
    assert read.code == 3
    assert "$28.00 an hour now" in read.line
    assert "planned at $21.96" in read.line
    assert "~2026" in read.line  # of when the planned price is
    assert "--max-price-rise 0.28" in read.line
    assert sky.asked("launch") == []
    assert not (tmp_path / "runs").exists()


def test_a_dearer_machine_is_taken_at_its_price_where_that_was_said(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    planned = tuppence(*ON_AWS, "--dry-run", "--json").document
    sky.says("quote", *quotes(planned, 1.09, others=1.3))
    sky.says("launch", {"job_id": 7})
    read = tuppence(*ON_AWS, "--yes", "--detach", "--sky", str(sky.python))
    assert read.code == 0, read.err
    train = launched(tmp_path).launch.stages[-1]
    before = planned["launch"]["stages"][-1]["machines"]
    assert len(before) > 1
    (machine,) = train.machines  # the others are too dear now
    assert machine.usd_per_hour == pytest.approx(1.09 * before[0]["usd_per_hour"])
    (asked,) = sky.asked("launch")
    task = list(yaml.safe_load_all(asked["yaml"]))[-1]
    (row,) = json.loads(task["envs"]["TUPPENCE_PRICES"])
    assert row["usd_per_hour"] == machine.usd_per_hour


def test_a_machine_that_is_not_for_rent_gives_way_and_it_is_said(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    words = (*ON_AWS, "--stages", "train")
    planned = tuppence(*words, "--dry-run", "--json").document
    gone, then = planned["launch"]["stages"][-1]["machines"][:2]
    left = {**planned["launch"]["stages"][-1], "machines": [then]}
    sky.says("quote", *quotes(planned, None), *quotes({"launch": {"stages": [left]}}, 1.0))
    sky.says("launch", {"job_id": 7})
    read = tuppence(*words, "--yes", "--detach", "--sky", str(sky.python))
    assert read.code == 0, read.err
    assert f"not for rent now: aws us-east-1 {gone['instance_type']}" in read.err
    assert "sold out" in read.err
    assert launched(tmp_path).launch.stages[-1].machines[0].instance_type == then["instance_type"]


def test_without_credentials_it_says_for_which_cloud(tuppence: Tuppence, sky: FakeSky) -> None:
    sky.says("enabled", {"clouds": [], "why_not": {"aws": "AWS credentials are not set"}})
    read = tuppence("launch", *AWS, BUDGET, "--store", "shared", "--sky", str(sky.python), "--yes")
    assert read.code == 2
    assert "no credentials" in read.line
    assert "aws: AWS credentials are not set" in read.line


# ---------------------------------------------------------------- started


def started(tuppence: Tuppence, sky: FakeSky, *more: str) -> Answer:
    sky.says("launch", {"job_id": 7})
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--yes", "--detach")
    return tuppence(*words, *more)


def test_launch_json_is_ahead_of_everything(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    make, send = store_made.make, following.kit.send_kit

    def made(place: str, **kind: Any) -> bool:
        found = launched(tmp_path)
        assert place in found.made
        assert not Path(place).exists()
        seen.append(found.state)
        return make(place, **kind)

    def sent(place: str, packed: Any) -> bool:
        assert f"{place}/kit/{packed.sha}" in launched(tmp_path).made
        seen.append("kit")
        return send(place, packed)

    def launch(self: Sky, text: str, *, name: str, secrets: Any) -> int:
        found = launched(tmp_path)
        assert (found.jobs[-1].name, found.jobs[-1].job_id) == (name, None)
        assert list(Path("shared/kit").glob("*/code.tar.gz"))
        seen.append("job")
        return 7

    monkeypatch.setattr(store_made, "make", made)
    monkeypatch.setattr(following.kit, "send_kit", sent)
    monkeypatch.setattr(Sky, "launch", launch)
    assert started(tuppence, sky).code == 0
    assert seen == ["planned", "kit", "job"]
    found = launched(tmp_path)
    assert (found.state, found.jobs[-1].job_id) == ("started", 7)
    assert found.launch.budget == Budget(usd=0.5)


def test_a_launch_that_is_refused_leaves_nothing_and_stop_knows_it(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    sky.says("launch", error("no_capacity", "A100:1 on slurm"))
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--yes")
    read = tuppence(*words)
    assert read.code == 3
    assert "no capacity now: A100:1 on slurm" in read.line
    found = launched(tmp_path)
    assert sky.asked("cancel")[0]["name"] == found.jobs[-1].name
    assert "nothing of shakespeare runs" in read.err
    assert found.state != "started"
    done = tuppence("stop", "shakespeare", "--bucket", "--yes", "--sky", str(sky.python))
    assert done.code == 0, done.err
    assert not list(Path("shared").rglob("code.tar.gz"))


def test_a_machine_that_a_failed_launch_left_is_named(
    tuppence: Tuppence, sky: FakeSky, monkeypatch: pytest.MonkeyPatch
) -> None:
    sky.says("launch", error("away", "no answer"))
    monkeypatch.setattr(guarding, "end", lambda *_, **__: ["shakespeare-train-7"])
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--yes")
    read = tuppence(*words)
    assert read.code == 1
    assert "left      shakespeare-train-7: tuppence stop shakespeare" in read.err


def test_what_runs_is_not_launched_again(tuppence: Tuppence, sky: FakeSky, tmp_path: Path) -> None:
    assert started(tuppence, sky).code == 0
    name = launched(tmp_path).jobs[-1].name
    sky.says("queue", {"jobs": [job(name=name, task="shakespeare-train", job_id=7)]})
    read = started(tuppence, sky)
    assert read.code == 2
    assert "tuppence status shakespeare" in read.line
    assert len(sky.asked("launch")) == 1


def test_what_is_finished_says_so(tuppence: Tuppence, sky: FakeSky, tmp_path: Path) -> None:
    assert started(tuppence, sky).code == 0
    name = launched(tmp_path).jobs[-1].name
    sky.says("queue", {"jobs": [job(name=name, status="SUCCEEDED", job_id=7)]})
    for _ in range(2):
        read = started(tuppence, sky)
        assert read.code == 0
        assert "is finished; nothing to do" in read.err
    assert len(sky.asked("launch")) == 1
    assert launched(tmp_path).state == "finished"


def test_a_run_that_stands_goes_on(tuppence: Tuppence, sky: FakeSky, tmp_path: Path) -> None:
    assert started(tuppence, sky).code == 0
    first = launched(tmp_path)
    sky.says("queue", {"jobs": [job(name=first.jobs[-1].name, status="FAILED", job_id=7)]})
    other = tuppence(
        *("launch", *SLURM, "train.seed=7", "--store", "shared", "--sky", str(sky.python)),
        *("--yes", "--detach"),
    )
    assert other.code == 2
    assert "other words (train.seed=7)" in other.line
    assert started(tuppence, sky, "--max-price-rise", "0.2").code == 0
    again = launched(tmp_path)
    assert [each.job_id for each in again.jobs] == [7, 7]
    assert again.jobs[0].name != again.jobs[1].name
    assert again.launch.words == first.launch.words
    assert again.created_at == first.created_at


def test_a_spent_budget_rents_nothing(tuppence: Tuppence, sky: FakeSky, tmp_path: Path) -> None:
    assert started(tuppence, sky).code == 0
    name = launched(tmp_path).jobs[-1].name
    sky.says("queue", {"jobs": [job(name=name, status="FAILED", job_id=7)]})
    row = {"start": 0.0, "end": 1400.0, "phase": "train", "usd_per_hour": 1.25, "attempt": 1}
    ledger = tmp_path / "shared" / "runs" / "shakespeare" / "ledger.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_text(json.dumps({**row, "usd": 0.49}) + "\n")
    read = started(tuppence, sky)
    assert read.code == 3
    assert "has spent $0.49 of $0.50" in read.line
    ledger.write_text(json.dumps({**row, "usd": 0.2}) + "\n")
    assert started(tuppence, sky).code == 0


def test_a_folder_of_another_run_is_left_alone(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    (tmp_path / "runs" / "shakespeare").mkdir(parents=True)
    (tmp_path / "runs" / "shakespeare" / "run.json").write_text("{}")
    read = started(tuppence, sky)
    assert read.code == 2
    assert "name=..." in read.line
    assert sky.asked("launch") == []


def test_values_of_secrets_are_nowhere(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = started(tuppence, sky, "train.wandb=online")
    assert lacking.code == 2
    assert "needs WANDB_API_KEY" in lacking.line
    monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
    read = started(tuppence, sky, "train.wandb=online")
    assert read.code == 0, read.err
    assert launched(tmp_path).launch.secrets == ("WANDB_API_KEY",)
    assert "hush-hush" not in read.out + read.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"hush-hush" in path.read_bytes()]


def test_keys_that_end_before_the_run_are_warned_of(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(tuppence, sky).code == 0
    made = dataclasses.replace(launched(tmp_path).launch, secrets=("AWS_SESSION_TOKEN",))
    for seconds, warned in ((600.0, False), (7200.0, True)):
        stages = (dataclasses.replace(made.stages[-1], seconds=seconds),)
        following.warn_of_keys(dataclasses.replace(made, stages=stages))
        assert ("keys of a session" in capsys.readouterr().err) == warned


def test_texts_of_this_machine_are_sent(tuppence: Tuppence, sky: FakeSky, tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name} says something. " * 500)
    read = started(tuppence, sky, "data.source=b.txt,a.txt", "name=mine")
    assert read.code == 0, read.err
    words = launched(tmp_path, "mine").launch.words
    (source,) = [word for word in words if word.startswith("data.source=")]
    folder = Path(source.partition("=")[2])
    assert folder.is_relative_to(tmp_path / "shared" / "texts")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["00000-b.txt", "00001-a.txt"]  # read in the order that was asked
    assert (folder / names[0]).read_bytes() == (tmp_path / "b.txt").read_bytes()
    (tmp_path / "weights").mkdir()
    refused = started(tuppence, sky, "train.init_from=weights", "name=third")
    assert refused.code == 2


def test_a_recipe_file_travels_with_the_code(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from tuppence.recipes import shakespeare\n\n\ndef small():\n    return shakespeare()\n"
    )
    sky.says("launch", {"job_id": 7})
    words = ("launch", "mine.py:small", *SLURM[1:], "--store", "shared", "--yes", "--detach")
    read = tuppence(*words, "--sky", str(sky.python))
    assert read.code == 0, read.err
    assert launched(tmp_path, "small").launch.words[0] == "own/mine.py:small"
    (code,) = (tmp_path / "shared").rglob("code.tar.gz")
    with tarfile.open(code) as tar:
        assert "own/mine.py" in tar.getnames()


def test_one_name_is_launched_once_at_a_time(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[Answer] = []

    def launch(self: Sky, text: str, **_: Any) -> int:
        inner.append(started(tuppence, sky))
        return 7

    monkeypatch.setattr(Sky, "launch", launch)
    assert started(tuppence, sky).code == 0
    assert inner[0].code == 2
    assert "is being launched already" in inner[0].line
    assert [each.job_id for each in launched(tmp_path).jobs] == [7]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_while_it_is_launched_holds(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def stopped(*_: Any, **__: Any) -> int:
        found = launched(tmp_path)
        record.write(tmp_path / "runs" / "shakespeare", dataclasses.replace(found, state="stopped"))
        return 7

    if when == "before":
        monkeypatch.setattr(following.kit, "send_kit", stopped)
    else:
        monkeypatch.setattr(Sky, "launch", stopped)
    read = started(tuppence, sky)
    assert read.code == 2
    assert "was stopped while it was launched" in read.line
    assert sky.asked("launch") == []
    assert sky.asked("cancel")[0]["name"] == launched(tmp_path).jobs[-1].name
    assert launched(tmp_path).state == "stopped"


def test_what_has_ended_is_not_rented_for_again(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    assert started(tuppence, sky).code == 0
    events = tmp_path / "shared" / "runs" / "shakespeare" / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text(json.dumps({"time": 1.0, "code": "end", "text": "over"}) + "\n")
    read = started(tuppence, sky)  # SkyPilot knows no job of it any more
    assert read.code == 0
    assert "is finished; nothing to do" in read.err
    assert len(sky.asked("launch")) == 1


def test_a_controller_that_stays_after_a_failure_is_named(tuppence: Tuppence, sky: FakeSky) -> None:
    sky.says("launch", error("away", "no answer"))
    row = {**cluster("sky-jobs-controller-1"), "status": "INIT"}
    sky.says("clusters", {"clusters": [row]})
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--yes")
    assert "sky-jobs-controller-1 is INIT, and is billed" in tuppence(*words).err


def test_stop_leaves_what_another_launch_reads(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path
) -> None:
    theirs = tmp_path / "shared" / "runs" / "shakespeare" / "kept"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("of a run that was there")
    assert started(tuppence, sky).code == 0
    assert started(tuppence, sky, "name=other").code == 0
    store_made.delete(launched(tmp_path))
    assert theirs.exists()
    assert list((tmp_path / "shared" / "kit").glob("*/code.tar.gz"))


# ---------------------------------------------------------------- a bucket


def test_the_bucket_is_made_where_it_is_not_there_and_goes_with_the_rest(
    tuppence: Tuppence, sky: FakeSky, s3: str, tmp_path: Path
) -> None:
    name = f"{s3.split('/')[2]}-new"
    sky.says("launch", {"job_id": 7})
    words = ("launch", *SLURM, "--store", f"s3://{name}/t", "--sky", str(sky.python), "--yes")
    read = tuppence(*words, "--detach")
    assert read.code == 0, read.err
    assert name in buckets(s3)
    assert f"s3://{name}/t" in launched(tmp_path).made
    assert store.Store(f"s3://{name}/t").find("kit")
    sky.says("queue", {"jobs": []})
    done = tuppence("stop", "shakespeare", "--bucket", "--yes", "--sky", str(sky.python))
    assert done.code == 0, done.err
    assert name not in buckets(s3)


def test_what_was_there_before_stays(
    tuppence: Tuppence, sky: FakeSky, s3: str, tmp_path: Path
) -> None:
    root = s3.rpartition("/runs/")[0]
    store.Store(root).write("data/mine.txt", b"of another run")
    sky.says("launch", {"job_id": 7})
    words = ("launch", *SLURM, "--store", root, "--sky", str(sky.python), "--yes", "--detach")
    assert tuppence(*words).code == 0
    assert root not in launched(tmp_path).made
    store_made.delete(launched(tmp_path))
    assert list(store.Store(root).find()) == ["data/mine.txt"]
    store_made.delete(launched(tmp_path), data=True)
    assert not store.Store(root).find()
    assert root.removeprefix("s3://") in buckets(s3)


# ---------------------------------------------------------------- followed


def test_ctrl_c_leaves_it_running_and_says_how_to_end_it(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(guarding, "watch_launch", interrupted)
    sky.says("launch", {"job_id": 7})
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--yes")
    read = tuppence(*words)
    assert read.code == 0
    assert "goes on, and costs money" in read.err
    assert "tuppence stop shakespeare" in read.err
    assert sky.asked("cancel") == []
    assert launched(tmp_path).state == "started"


def test_a_failed_job_is_one_line_and_nothing_is_left(
    tuppence: Tuppence, sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuppence.following.secrets.token_hex", lambda size: "abc123")
    rows = [
        job(name="shakespeare-abc123", task="shakespeare-train", job_id=7, status="FAILED"),
    ]
    rows[0]["end_at"] = 1e9 + 90
    sky.says("queue", {"jobs": rows})
    sky.says("clusters", {"clusters": [cluster("shakespeare-train-7")]})
    sky.says("down", {"down": True, "_then": {"clusters": {"clusters": []}}})
    sky.says("launch", {"job_id": 7})
    words = ("launch", *SLURM, "--store", "shared", "--sky", str(sky.python), "--yes")
    read = tuppence(*words)
    assert read.code == 1
    assert "tuppence logs shakespeare" in read.line
    assert [payload["cluster"] for payload in sky.asked("down")] == ["shakespeare-train-7"]
