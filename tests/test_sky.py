"""SkyPilot, asked by subprocess: answers, errors in one line, its environment."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fake_sky
import pytest
import sky_catalogs
import sky_env
from fake_sky import FakeSky, error

from tuppence.cloud import sky as skypilot
from tuppence.cloud import sky_environment
from tuppence.cloud.launch import Rented
from tuppence.cloud.sky import Sky, Unreachable
from tuppence.errors import DoesNotFit, Fault, UserError
from tuppence.files import asset


@pytest.fixture
def fake(tmp_path: Path) -> FakeSky:
    return FakeSky(tmp_path)


def rented(cloud: str, accelerator: str | None, **given: Any) -> Rented:
    row = {"region": None, "instance_type": None, "gpu_count": 8, "vcpus": None, "spot": False}
    more = {"memory_gib": None, "usd_per_hour": 1.0, "price": "test"}
    return Rented(cloud=cloud, accelerator=accelerator, **{**row, **more, **given})


# ---------------------------------------------------------------- asked and answered


def test_an_answer_comes_as_plain_data(fake: FakeSky) -> None:
    fake.says("queue", {"jobs": [fake_sky.job(task_id=1), fake_sky.job(task_id=0)]})
    rows = Sky(fake.python).queue("tiny-abc123")
    assert [row.task_id for row in rows] == [0, 1]
    assert rows[0].cluster == "tiny-train-1"
    assert fake.asked("queue") == [{"name": "tiny-abc123"}]


def test_what_a_later_driver_says_more_is_passed_over(fake: FakeSky) -> None:
    fake.says("queue", {"jobs": [{**fake_sky.job(), "mood": "sunny"}]})
    (row,) = Sky(fake.python).queue("tiny-abc123")
    assert row.cluster == "tiny-train-1"


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        ("away", Unreachable, "gives no answer"),
        ("no_capacity", DoesNotFit, "try other machines"),
        ("no_machine", UserError, "tuppence plan --all"),
        ("quota", UserError, "ask the cloud for quota"),
        ("no_credentials", UserError, "sky check"),
        ("login", UserError, "sky api login"),
        ("version", UserError, "sky api stop"),
        ("refused", UserError, "SkyPilot refuses"),
        ("storage", UserError, "SkyPilot refuses"),
        ("no_sky", UserError, "pip install skypilot"),
        ("unknown", Fault, "SkyPilot: "),
    ],
)
def test_an_error_is_one_line_of_its_kind_with_the_remedy(
    fake: FakeSky, code: str, kind: type[Exception], remedy: str
) -> None:
    fake.says("queue", error(code, "the cloud said no " + "x" * 900))
    with pytest.raises(kind, match=remedy) as caught:
        Sky(fake.python).queue("tiny")
    assert "the cloud said no" in str(caught.value) or code == "no_sky"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_driver_that_dies_is_told_by_its_last_words(fake: FakeSky) -> None:
    fake.says("queue", {"_exit": 1, "_stderr": "Traceback\n  File x\nValueError: boom\n"})
    with pytest.raises(Fault, match="ValueError: boom"):
        Sky(fake.python).queue("tiny")
    fake.says("queue", {"_exit": -9})
    with pytest.raises(Fault, match="said nothing"):
        Sky(fake.python).queue("tiny")


def test_no_answer_in_time_is_no_answer(fake: FakeSky) -> None:
    fake.says("queue", {"_sleep": 600, "jobs": []})
    with pytest.raises(Unreachable, match=r"no answer to queue in 0\.5 s"):
        Sky(fake.python).ask("queue", wait=0.5)


def test_a_python_that_is_not_there_is_the_person_s_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such Python"):
        skypilot.found(str(tmp_path / "python"))
    plain = tmp_path / "text"
    plain.write_text("no program")
    with pytest.raises(UserError, match="cannot be started"):
        skypilot.found(str(plain))


def test_another_skypilot_is_refused(fake: FakeSky) -> None:
    assert skypilot.found(str(fake.python)).python == fake.python
    fake.says("version", {"version": "0.9.2"})
    with pytest.raises(UserError, match=r"SkyPilot 0\.9\.2"):
        skypilot.found(str(fake.python))


def test_a_python_without_skypilot_says_so() -> None:
    with pytest.raises(UserError, match="has no SkyPilot"):
        skypilot.found(sys.executable)


def test_what_skypilot_says_of_a_launch_is_shown_as_it_comes(
    fake: FakeSky, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.says("launch", {"job_id": 7, "_stderr": "\x1b[33mLaunching\x1b[0m\nProvisioning\n"})
    fake.says("queue", {"jobs": [], "_stderr": "not shown\n"})
    monkeypatch.setenv("TOKEN_OF_MINE", "s3cret")
    sky = Sky(fake.python)
    assert sky.launch("run: x", name="tiny-1", secrets=("TOKEN_OF_MINE",)) == 7
    assert sky.queue("tiny-1") == []
    assert capsys.readouterr().err == "sky | Launching\nsky | Provisioning\n"
    assert fake.asked("launch")[0]["secrets"] == ["TOKEN_OF_MINE"]
    assert "s3cret" not in json.dumps(fake.asked())


def test_a_secret_that_is_not_set_here_starts_nothing(fake: FakeSky) -> None:
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE is not set"):
        Sky(fake.python).launch("run: x", name="tiny-1", secrets=("NOT_SET_ANYWHERE",))
    assert fake.asked() == []


def test_logs_are_the_job_s_own_text(fake: FakeSky, capsys: pytest.CaptureFixture[str]) -> None:
    sky = Sky(fake.python)
    row = skypilot.Job(**fake_sky.job(task_id=1))
    fake.says("logs", {"_text": "step 1\nstep 2\n", "_exit": 100})
    assert sky.logs(row, tail=2) == 100
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    fake.says("logs", {"_text": "", "_exit": 1, "_stderr": json.dumps(error("away", "gone"))})
    with pytest.raises(Unreachable, match="gone"):
        sky.logs(row)


# ---------------------------------------------------------------- its environment


class Steps:
    """Stands for venv and pip."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.fails = ""
        monkeypatch.setattr(sky_environment, "_step", self._step)

    def _step(self, command: list[str], what: str) -> None:
        self.commands.append(command)
        if what == self.fails:
            raise Fault(f"{what} failed")


def test_the_environment_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path
) -> None:
    steps = Steps(monkeypatch)
    python = sky_environment.environment()
    assert python.is_relative_to(cache_home / "tuppence" / "sky-0.14.1")
    assert steps.commands[0][1:3] == ["-m", "venv"]
    assert steps.commands[1][-1] == "skypilot[aws,gcp,lambda,nebius,runpod,slurm]==0.14.1"
    assert sky_environment.environment() == python
    assert len(steps.commands) == 2
    sky_environment.environment(extras=("azure",))  # one more, and none is lost
    assert "aws,azure,gcp" in steps.commands[-1][-1]


def test_an_environment_that_was_not_made_whole_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    steps.fails = "pip"
    with pytest.raises(Fault, match="pip failed"):
        sky_environment.environment(tmp_path / "sky")
    steps.fails = ""
    sky_environment.environment(tmp_path / "sky")
    assert len(steps.commands) == 4


def test_a_step_that_fails_says_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    says = "print('Collecting'); print('ERROR: no network'); raise SystemExit(1)"
    with pytest.raises(Fault, match=r"pip: ERROR: no network; .* --sky"):
        sky_environment._step([sys.executable, "-c", says], "pip")
    assert "pip | Collecting" in capsys.readouterr().err


# ---------------------------------------------------------------- the driver's own parts


@pytest.fixture(scope="module")
def parts() -> dict[str, ModuleType]:
    """sky_errors.py and sky_catalog.py, which need no SkyPilot until they are asked."""
    sys.path.insert(0, str(asset("sky_driver.py").parent))
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        return {name: importlib.import_module(name) for name in ("sky_errors", "sky_catalog")}
    finally:
        sys.path.pop(0)
        sys.dont_write_bytecode = before


def raised(name: str, text: str, parent: type[Exception] = Exception, **more: Any) -> Exception:
    """An error of a class of that name, as SkyPilot has them."""
    found = type(name, (parent,), {})(text)
    vars(found).update(more)
    return found


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("NoCloudAccessError", "", "no_credentials"),
        ("ResourcesUnavailableError", "Failed to provision", "no_capacity"),
        ("ResourcesUnavailableError", "VcpuLimitExceeded in us-east-1", "quota"),
        ("ResourcesUnavailableError", "Catalog does not contain any instances", "no_machine"),
        ("ApiServerConnectionError", "http://127.0.0.1:46580", "away"),
        ("APIVersionMismatchError", "restart", "version"),
        ("SomethingNew", "boom", "unknown"),
    ],
)
def test_each_of_skypilot_s_errors_has_a_code(
    parts: dict[str, ModuleType], name: str, text: str, code: str
) -> None:
    assert parts["sky_errors"].code_of(raised(name, text)) == code
    child = type("Kind", (type(raised(name, text)),), {})(text)  # of a class below it
    assert parts["sky_errors"].code_of(child) == code


def test_a_message_is_one_line_with_what_was_tried(parts: dict[str, ModuleType]) -> None:
    history = [ValueError("us-east-1: none"), ValueError("us-west-2: none")] * 2
    error = raised(
        "ResourcesUnavailableError", "\x1b[31mNo\n  luck\x1b[0m", failover_history=history
    )
    told = parts["sky_errors"].message_of(error)
    assert told == "No luck tried: us-east-1: none; us-west-2: none"
    assert len(parts["sky_errors"].message_of(ValueError("x" * 5000))) == 600


def test_reasons_are_read_from_the_table_of_sky_check(parts: dict[str, ModuleType]) -> None:
    text = (
        "Checking\n  AWS: disabled\n    Reason [compute]: no keys\n    Run aws configure"
        "\n  Lambda: enabled [compute]\n  Slurm: disabled\n    Reason: none\n\n Enabled infra \n"
    )
    assert parts["sky_catalog"]._reasons(text) == {
        "aws": "no keys Run aws configure",
        "slurm": "none",
    }


# ---------------------------------------------------------------- the real library


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sky:
    """The real SkyPilot with small catalogs in a home of its own; its server is nowhere."""
    python = sky_env.sky_python()
    sky_catalogs.write(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_API_SERVER_ENDPOINT", "http://127.0.0.1:9")
    return Sky(python)


def test_real_version_says_who_answers_without_starting_it(real: Sky) -> None:
    found = real.version()
    assert found["version"] == "0.14.1"
    assert found["server"]["status"] != "healthy"


def test_real_quotes_are_the_catalog_s(real: Sky) -> None:
    machines = [
        rented("aws", "A100", instance_type="p4d.24xlarge"),
        rented("lambda", "H100"),
        rented("aws", None, gpu_count=0, vcpus=8, memory_gib=16),
        rented("aws", "A1000"),
        rented("lambda", "H100", spot=True),
        rented("nowhere", "H100"),
    ]
    p4d, h100, cpu, unknown, spot, nowhere = real.quote(machines)
    listed = sky_catalogs.price_book().offers
    cheapest = min(
        o.usd_per_hour for o in listed if o.instance_type == "p4d.24xlarge" and o.usd_per_hour
    )
    assert p4d.usd_per_hour == pytest.approx(cheapest)
    assert p4d.regions
    assert h100.instance_type == "gpu_8x_h100_sxm5"
    assert cpu.usd_per_hour is not None
    for none in (unknown, spot, nowhere):
        assert none.usd_per_hour is None
        assert none.why


def test_real_driver_s_errors_arrive_as_ours(real: Sky) -> None:
    good = "name: x-train\nresources: {infra: aws, accelerators: 'A100:8'}\nrun: echo\n"
    with pytest.raises(UserError, match="Instead of 'rnu', did you mean 'run'"):
        real.ask("launch", yaml=good.replace("run:", "rnu:"), name="x")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        real.queue("tiny")
