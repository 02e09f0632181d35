"""assets/node.sh, run by bash as a machine runs it; the trainer is a stand-in, or the real one."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bucket_runs import objects
from known import know_this_machine
from test_recovery import TINY

from tuppence import bucket, held, node
from tuppence.cloud import kit
from tuppence.config import DataPlan
from tuppence.folder import RunFolder
from tuppence.held import Held
from tuppence.ledger import spent
from tuppence.plan.hardware import Calibration

pytest_plugins = ["bucket_places"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="machines that are rented run Linux")
pytestmark = linux
QUICK = {"RETRY_AFTER": "0", "KILL_AFTER": "1"}
STAND_IN = """\
#!/usr/bin/env bash
# an interpreter whose verbs are a test's own
case "$*" in
  "-m tuppence --version" | "-m tuppence.node "*) exec {python} "$@" ;;
esac
printf '%s\\n' "$@" >"{place}/said-$3"
echo >>"{place}/times"
{code}
"""


@pytest.fixture(scope="session")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in a folder, with a kit whose script waits less."""
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(store / "cache"))
        made = kit.make_kit()
        kit.send_kit(str(store), made)
    script = Path(kit.place_of(str(store), made.sha)) / "node.sh"
    text = script.read_text()
    for name, value in QUICK.items():
        text, changed = re.subn(rf"(?m)^{name}=\d+", f"{name}={value}", text)
        assert changed == 1
    script.write_text(text)
    return store


class Machine:
    """A machine with a store, and an interpreter that does what a test says."""

    def __init__(self, place: Path, sent: Path) -> None:
        self.place, self.store = place, place / "store"
        shutil.copytree(sent / "kit", self.store / "kit")
        self.script = next(self.store.glob("kit/*/node.sh"))
        self.run = place / "work/runs/x"
        self.env = {"HOME": str(place), "PATH": f"{place}/bin:{os.environ['PATH']}"}
        for key in ("XDG_CACHE_HOME", "OMP_NUM_THREADS"):
            if key in os.environ:
                self.env[key] = os.environ[key]

    def python(self, code: str) -> str:
        """An interpreter whose verbs of tuppence are these lines of bash."""
        return self.tool(
            "stand-in", STAND_IN.format(python=sys.executable, place=self.place, code=code)
        )

    def tool(self, name: str, text: str) -> str:
        path = self.place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def start(self, *words: str, store: str | None = None) -> subprocess.Popen[str]:
        fixed = ["--store", store or str(self.store), "--name", "x", "--work", f"{self.place}/work"]
        return subprocess.Popen(
            ["bash", str(self.script), words[0], *fixed, *words[1:]],
            env=self.env | {k: v for k, v in os.environ.items() if k.startswith("AWS_")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.place,
        )

    def done(self, *words: str, store: str | None = None) -> tuple[int, str]:
        process = self.start(*words, store=store)
        out, _ = process.communicate(timeout=300)
        return process.returncode, out

    def said(self, verb: str = "train") -> list[str]:
        return (self.place / f"said-{verb}").read_text().splitlines()

    def times(self) -> int:
        return (self.place / "times").read_text().count("\n")

    def events(self) -> list[str]:
        path = self.store / "runs/x/events.jsonl"
        return [row["code"] for row in map(json.loads, path.read_text().splitlines())]


@pytest.fixture
def machine(tmp_path: Path, sent: Path) -> Iterator[Machine]:
    """It goes away with all that still runs on it."""
    yield Machine(tmp_path, sent)
    for pid in alive(f"HOME={tmp_path}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def alive(word: str) -> list[int]:
    """Processes whose environment has this word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


PRICE = ("--usd-per-hour", "3.6")


# ---------------------------------------------------------------- words, prices, codes


def test_what_the_trainer_is_told(machine: Machine) -> None:
    python = machine.python("exit 0")
    since = time.time() - 100
    options = ["--since", f"{since}", "--tail", "7", "--budget-usd", "5"]
    code, out = machine.done("train", "--python", python, *PRICE, *options, "--", "quick", "a=b c")
    assert code == 0, out
    told = machine.run / "held.json"
    place = [f"{machine.store}/runs", "--data", f"{machine.store}/data", "--held", str(told)]
    words = ["-m", "tuppence", "train", "quick", "a=b c", "machine.usd_per_hour=3.6", "--runs"]
    assert machine.said() == [*words, *place]
    there = held.read(told)
    assert there.since == pytest.approx(since)
    assert since < there.setup <= time.time()
    assert (there.usd_per_hour, there.tail_seconds, there.prepare) == (3.6, 7.0, None)
    deadline = json.loads((machine.run / "deadline.json").read_text())["deadline"]
    assert deadline == pytest.approx(since + 5000 - 3.5)


def test_stages_in_order(machine: Machine) -> None:
    python = machine.python(f'echo $3 >>"{machine.place}/order"')
    words = ["--python", python, *PRICE, "--tasks", "core,bpb", "--", "quick"]
    code, out = machine.done("prepare", "train", "eval", *words)
    assert code == 0, out
    assert (machine.place / "order").read_text().split() == ["prepare", "train", "eval"]
    data = f"{machine.store}/data"
    assert machine.said("prepare")[2:] == ["prepare", "quick", "--data", data]
    run = f"{machine.store}/runs/x"
    assert machine.said("eval")[2:] == ["eval", run, "--tasks", "core,bpb", "--data", data]
    there = held.read(machine.run / "held.json")
    assert there.prepare is not None
    assert there.since <= there.setup <= there.prepare


def test_the_price_is_looked_up(machine: Machine) -> None:
    python = machine.python("exit 0")
    row = {"region": "us-east-1", "accelerator": None, "gpu_count": 0, "spot": True}
    table = [
        row | {"cloud": "aws", "usd_per_hour": 12.5},
        row | {"cloud": "lambda", "region": None, "usd_per_hour": 10.25},
    ]
    machine.env["TUPPENCE_PRICES"] = json.dumps(table)
    where = {"cluster_name": "c", "cloud": "Lambda", "region": "europe", "zone": None}
    machine.env["SKYPILOT_CLUSTER_INFO"] = json.dumps(where)
    code, out = machine.done("train", "--python", python, "--", "quick")
    assert code == 0, out
    assert "machine.usd_per_hour=10.25" in machine.said()
    there = held.read(machine.run / "held.json")
    assert there.price_note is None
    assert there.since < time.time() - 15  # a rented machine is paid from its boot on
    machine.env["SKYPILOT_CLUSTER_INFO"] = json.dumps(where | {"cloud": "GCP"})
    code, out = machine.done("train", "--python", python, "--", "quick")
    assert code == 0, out
    assert "machine.usd_per_hour=12.5" in machine.said()
    note = held.read(machine.run / "held.json").price_note
    assert note is not None
    assert "no price is known of GCP europe" in note


A100 = "NVIDIA A100-SXM4-40GB"
TABLE = [
    {"cloud": "aws", "region": "us-east-1", "accelerator": "A100", "gpu_count": 8, "usd": 30},
    {"cloud": "aws", "region": "us-west-2", "accelerator": "A100", "gpu_count": 8, "usd": 31},
    {"cloud": "aws", "region": "us-east-1", "accelerator": "A100-80GB", "gpu_count": 8, "usd": 40},
    {"cloud": "aws", "region": None, "accelerator": "A10G:1", "usd": 1},
    {"cloud": "gcp", "region": "us-central1", "accelerator": None, "gpu_count": 0, "usd": 0.3},
    {"cloud": "slurm", "region": None, "accelerator": "A100", "gpu_count": 2, "usd": 2.5},
    {"cloud": None, "region": None, "accelerator": "H100", "gpu_count": 8, "usd": 32},
]


@pytest.mark.parametrize(
    ("cloud", "region", "count", "cards", "usd", "known"),
    [
        ("AWS", "us-east-1", 8, [A100] * 8, 30, True),
        ("AWS", "us-west-2", 8, [A100] * 8, 31, True),
        ("AWS", "us-east-1", 8, ["NVIDIA A100-SXM4-80GB"] * 8, 40, True),
        ("AWS", "us-east-1", 8, [], 40, False),  # no driver says which of the two it is
        ("AWS", "eu-west-1", 1, ["NVIDIA A10G"], 1, True),
        ("GCP", "us-central1", 0, [], 0.3, True),
        ("Slurm", "pretended", 2, [], 2.5, True),
        ("AWS", "us-east-1", 4, [A100] * 4, 40, False),
        ("Azure", "eastus", 8, [A100] * 8, 40, False),
        ("AWS", "us-east-1", 8, ["NVIDIA L4"] * 8, 40, False),
        ("Vast", "anywhere", 8, ["NVIDIA H100 PCIe"] * 8, 32, True),
    ],
)
def test_which_row_of_the_table(
    cloud: str, region: str, count: int, cards: list[str], usd: float, known: bool
) -> None:
    rows = [{**row, "usd_per_hour": row["usd"]} for row in TABLE]
    found, note = node.choose_price(rows, {"cloud": cloud, "region": region}, count, cards)
    assert (found, note is None) == (usd, known)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "--nonsense", "1"], "--nonsense: no such option"),
        (["rain"], "rain: no such stage"),
        (["train", "--since", "soon", *PRICE], "--since soon: auto, boot"),
        (["train"], "no price of this machine"),
        (["setup", "--python", "/bin/false"], "/bin/false cannot run the code"),
    ],
)
def test_wrong_words_are_one_line(machine: Machine, words: list[str], line: str) -> None:
    python = [] if "--python" in words else ["--python", machine.python("exit 0")]
    code, out = machine.done(*words, *python)
    assert code == 2, out
    assert line in out


def test_a_package_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(node, "NEEDED", ("torch", "no_such_package"))
    assert node.main(["check", "--store", "s3://x"]) == 2
    assert "has no no_such_package: install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "times", "ends"), [(0, 1, 0), (1, 2, 75), (2, 1, 2), (3, 1, 3), (4, 1, 4), (75, 2, 75)]
)
def test_exit_codes_and_the_one_retry(machine: Machine, code: int, times: int, ends: int) -> None:
    python = machine.python(f"exit {code}")
    found, out = machine.done("train", "--python", python, *PRICE, "--", "quick")
    assert (found, machine.times()) == (ends, times), out


def test_a_retry_may_help(machine: Machine) -> None:
    python = machine.python(f'[ "$(wc -l <"{machine.place}/times")" = 2 ] || exit 1')
    code, out = machine.done("train", "--python", python, *PRICE, "--", "quick")
    assert (code, machine.times()) == (0, 2), out


def test_what_fails_at_once_is_not_tried_again(machine: Machine) -> None:
    text = machine.script.read_text().replace("RETRY_AFTER=0", "RETRY_AFTER=60")
    machine.script.write_text(text)
    python = machine.python("exit 1")
    code, out = machine.done("train", "--python", python, *PRICE, "--", "quick")
    assert (code, machine.times()) == (1, 1), out


def test_another_machine_is_asked_for_twice(machine: Machine) -> None:
    python = machine.python("kill -SEGV $$")
    words = ["train", "--python", python, *PRICE, "--", "quick"]
    assert [machine.done(*words)[0] for _ in range(3)] == [75, 75, 139]


# ---------------------------------------------------------------- signals and the dead-man timer


def test_a_signal_reaches_the_trainer(machine: Machine) -> None:
    python = machine.python("trap 'exit 143' TERM; echo ready >&2; while :; do sleep 0.05; done")
    process = machine.start("train", "--python", python, *PRICE, "--", "quick")
    until(lambda: (machine.place / "times").exists())
    until(lambda: bool(alive(f"TUPPENCE_STAGE=x.train.{process.pid}")))
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, machine.times()) == (143, 1), out


HUNG = {
    "ignores TERM": "trap '' TERM; while :; do sleep 0.05; done",
    "stands still": "kill -STOP $$",
    "has children in other sessions": "trap '' TERM; setsid sleep 600 & wait; wait",
}


@pytest.mark.parametrize("code", HUNG.values(), ids=HUNG.keys())
def test_a_hung_trainer_is_killed_at_the_deadline(machine: Machine, code: str) -> None:
    (machine.store / "runs/x").mkdir(parents=True)
    python = machine.python(code)
    since = time.time() - 3600 + 2  # two seconds before the money is spent
    words = ["--python", python, *PRICE, "--since", f"{since}", "--budget-usd", "3.6"]
    process = machine.start("train", *words, "--", "quick")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 124, out
    assert machine.times() == 1
    assert machine.events() == ["dead_man"]
    assert alive(f"TUPPENCE_STAGE=x.train.{process.pid}") == []


def test_preparation_on_a_paid_machine_is_under_its_clock(machine: Machine) -> None:
    (machine.store / "runs/x").mkdir(parents=True)
    python = machine.python("while :; do sleep 0.05; done")
    since = time.time() - 3600 + 2
    words = ["--python", python, *PRICE, "--since", f"{since}", "--budget-usd", "3.6"]
    code, out = machine.done("prepare", "train", *words, "--", "quick")
    assert (code, machine.times()) == (124, 1), out


def test_a_name_with_brackets_is_found_by_the_timer(machine: Machine) -> None:
    python = machine.python("while :; do sleep 0.05; done")
    since = time.time() - 3600 + 2
    words = ["--python", python, *PRICE, "--since", f"{since}", "--budget-usd", "3.6"]
    code, out = machine.done("train", *words, "--name", "a[1]", "--", "quick")
    assert code == 124, out


def test_who_ends_before_is_left_alone(machine: Machine) -> None:
    (machine.store / "runs/x").mkdir(parents=True)
    python = machine.python("sleep 0.7")
    since = time.time() - 3600 + 300
    words = ["--python", python, *PRICE, "--since", f"{since}", "--budget-usd", "3.6"]
    code, out = machine.done("train", *words, "--", "quick")
    assert code == 0, out
    assert not (machine.store / "runs/x/events.jsonl").exists()


def test_the_trainer_moves_the_deadline(machine: Machine) -> None:
    """Earlier attempts have spent most of it: only the trainer knows. Later it cannot be."""
    (machine.store / "runs/x").mkdir(parents=True)
    say = f'echo "{{\\"deadline\\": %s}}" >"{machine.run}/deadline.json"'
    first, second = say % "$(($(date +%s) + 3)).5", say % "$(($(date +%s) + 900))"
    hang = "for _ in {1..400}; do sleep 0.05; done"
    python = machine.python(f"{first}; sleep 1; {second}; {hang}")
    words = ["--python", python, *PRICE, "--budget-hours", "1"]
    code, out = machine.done("train", *words, "--", "quick")
    assert code == 124, out
    assert machine.events() == ["dead_man"]


def test_other_stages_have_limits_of_their_own(machine: Machine) -> None:
    python = machine.python("while :; do sleep 0.05; done")
    words = ["--python", python, "--limit", "eval=900", "--limit", "prepare=1", "--", "quick"]
    code, out = machine.done("prepare", *words)
    assert code == 124, out


def test_what_a_killed_trainer_used_is_charged(machine: Machine) -> None:
    """Hung, it wrote no line; the next attempt must not find that money unspent."""
    run = machine.store / "runs/x"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    since = time.time() - 100
    row = {"start": since, "end": since + 40, "phase": "train", "node": "here"}
    row |= {"usd_per_hour": 3.6, "usd": 0.04, "attempt": 1}
    python = machine.python(f"echo '{json.dumps(row)}' >>{run}/ledger.jsonl; kill -KILL $$")
    words = ["--python", python, *PRICE, "--since", f"{since}", "--tail", "9"]
    code, out = machine.done("train", *words, "--", "quick")
    assert code in (75, 137), out
    rows = list(RunFolder(run).rows("ledger"))
    assert rows[-1]["phase"] == "idle"
    assert rows[-1]["start"] == since + 40
    assert since + 100 + 9 < rows[-1]["end"] <= time.time() + 9


# ---------------------------------------------------------------- many processes


def test_ranks_of_several_nodes(machine: Machine) -> None:
    python = machine.python("exit 0")
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    machine.env |= nodes | {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    code, out = machine.done("prepare", "train", "--python", python, *PRICE, "--", "quick")
    assert code == 0, out
    said = machine.said("--nnodes")
    assert said[:4] == ["-m", "torch.distributed.run", "--nnodes", "2"]
    assert said[4:8] == ["--node-rank", "1", "--master-addr", "10.0.0.1"]
    assert said[10:15] == ["--nproc-per-node", "1", "-m", "tuppence.node", "rank"]
    assert said[15:17] == [str(machine.run / "exit"), "train"]
    assert not (machine.place / "said-prepare").exists()  # the first node's work


def test_pretended_gpus_are_one_process(machine: Machine) -> None:
    python = machine.python("exit 0")
    machine.tool("nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    machine.env["SKYPILOT_NUM_GPUS_PER_NODE"] = "2"
    machine.env["SKYPILOT_CLUSTER_INFO"] = '{"cloud": "Slurm", "region": "pretended"}'
    code, out = machine.done("train", "--python", python, *PRICE, "--", "quick")
    assert code == 0, out
    assert machine.said()[:3] == ["-m", "tuppence", "train"]
    machine.env["SKYPILOT_CLUSTER_INFO"] = '{"cloud": "AWS", "region": "us-east-1"}'
    code, out = machine.done("train", "--python", python, *PRICE, "--", "quick")
    assert code == 75, out
    assert "2 GPUs were asked for, and no driver answers" in out


@pytest.mark.slow
def test_torchrun_hides_no_exit_code(machine: Machine, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tuppence.node", "rank", str(tmp_path / "exit"), "train", "budgte.usd=1"]
    done = subprocess.run(
        [sys.executable, *words], env=machine.env, cwd=tmp_path, check=False, capture_output=True
    )
    assert done.returncode == 1, done.stderr
    assert (tmp_path / "exit").read_text() == "2\n"


# ---------------------------------------------------------------- the environment

UV = """\
#!/usr/bin/env bash
# makes what uv would make: a Python in a folder, and no packages
echo "$*" >>"{place}/uv"
case "$1 $2" in
  "python install")
    while [ "$1" != --install-dir ]; do shift; done
    mkdir -p "$2/cpython-3.12.1-linux/bin" && cp "{python}" "$2/cpython-3.12.1-linux/bin/python3" ;;
esac
"""


def test_an_environment_is_made_once_and_unpacked_elsewhere(machine: Machine) -> None:
    python = machine.python("exit 0")
    machine.tool("uv", UV.format(place=machine.place, python=python))
    first = machine.place / "bin/python3"
    first.unlink(missing_ok=True)
    words = ["setup", "train", "--extras", "bucket,hub", "--pack", *PRICE, "--", "quick"]
    code, out = machine.done(*words)
    assert code == 0, out
    asked = (machine.place / "uv").read_text().splitlines()
    assert [line.split()[:2] for line in asked] == [["python", "install"], ["pip", "install"]]
    lists = re.findall(r"requirements/(\w+)\.txt", asked[1])
    assert lists == ["base", "bucket", "hub"]
    pack = machine.script.parent / f"env-{os.uname().machine}.tar"
    with tarfile.open(pack) as tar:
        assert "./python/cpython-3.12.1-linux/bin/python3" in tar.getnames()
    shutil.rmtree(machine.place / "work")  # another machine
    code, out = machine.done(*words)
    assert code == 0, out
    assert "environment unpacked" in out
    assert (machine.place / "uv").read_text().splitlines() == asked
    code, out = machine.done("setup", "--extras", "wandb")  # what is not in it is added
    assert code == 0, out
    assert len((machine.place / "uv").read_text().splitlines()) == 3
    code, out = machine.done("setup", "--extras", "nonsense")
    assert (code, "--extras nonsense: there is no such extra" in out) == (2, True)


def test_a_python_that_cannot_be_brought_is_said(machine: Machine) -> None:
    python = machine.python("exit 0")
    made = f'mkdir -p "${{@: -1}}/bin" && cp {python} "${{@: -1}}/bin/python"'
    verbs = f"case $1 in python) exit 1 ;; venv) {made} ;; esac"
    machine.tool("uv", f"#!/usr/bin/env bash\n{verbs}\n")
    code, out = machine.done("setup", "--pack")
    assert code == 0, out
    assert "using this machine's Python 3" in out
    assert "is not packed: it leans on this machine" in out
    assert not list(machine.store.glob("kit/*/env-*"))


# ---------------------------------------------------------------- the real trainer


@pytest.fixture
def known(cache_home: Path, calibration: Calibration, data_plan: DataPlan) -> None:
    know_this_machine(calibration, data_plan, [["budget.steps=1", *TINY]])


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_prepared_and_trained_every_second_is_charged(machine: Machine) -> None:
    since = time.time() - 45
    options = ["--python", sys.executable, *PRICE, "--budget-usd", "1", "--tail", "5"]
    words = ["shakespeare", *TINY[1:], "budget.usd=1", "budget.steps=20", "name=x"]
    code, out = machine.done("prepare", "train", *options, "--since", f"{since}", "--", *words)
    assert code == 0, out
    folder = RunFolder(machine.store / "runs/x")
    rows = list(folder.rows("ledger"))
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(rows))
    assert rows[0]["start"] == pytest.approx(since, abs=0.01)
    assert [row["phase"] for row in rows][:4] == ["provision", "install", "prepare", "provision"]
    assert rows[-1]["phase"] == "idle"


@pytest.mark.slow
@pytest.mark.usefixtures("known")
def test_a_bucket_is_the_store(machine: Machine, s3: str) -> None:
    """Data, run, kit, evaluations: all of it there; and a machine's last seconds are charged."""
    store = s3.removesuffix("/runs/x")
    options = ["--python", sys.executable, *PRICE, "--since", f"{time.time() - 30}"]
    words = ["shakespeare", *TINY[1:], "budget.steps=3", "name=x"]
    code, out = machine.done("prepare", "train", "eval", *options, "--", *words, store=store)
    assert code == 0, out
    there = objects(store)
    assert [name for name in there if name.startswith("data/") and name.endswith("manifest.json")]
    assert [name for name in there if re.fullmatch(r"runs/x/evaluations/\w+/bpb.json", name)]
    folder = bucket.fetched(s3, None)
    phases = {row["phase"] for row in folder.rows("ledger")}
    assert {"provision", "install", "prepare", "train"} <= phases
    before = spent(folder).seconds
    held.write(machine.run, Held(time.time() - 60, time.time() - 50, 3.6, 2.0))
    assert node.main(["charge", s3, str(machine.run)]) == 0
    later = spent(bucket.fetched(s3, None)).seconds
    assert later > before
