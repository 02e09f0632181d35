"""`tuppence fetch`: a run brought home from a bucket or a folder, every file compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bucket_places import closed, s3, server
from bucket_runs import begun, harm_delete, harm_flip, mirrored, save, store_at

from tuppence import checkpoint, cli, store
from tuppence.cloud import bringing, record, store_made
from tuppence.cloud.launch import LAUNCH_VERSION, Launch
from tuppence.config import Budget, Interval
from tuppence.errors import UserError
from tuppence.folder import RunFolder

__all__ = ["closed", "s3", "server"]

Tuppence = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("closed")


@pytest.fixture
def tuppence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Tuppence:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(params=["bucket", "folder"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run with two checkpoints, of which the first is the best, on a store."""
    folder = begun(tmp_path / ("made" if request.param == "bucket" else "shared/runs") / "x")
    save(folder, 100, best=True)
    save(folder, 200)
    folder.close()
    if request.param == "folder":
        return str(folder.path)
    url: str = request.getfixturevalue("s3")
    mirrored(folder, url)
    return url


def files_below(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def object_of(url: str, name: str) -> tuple[store.Store, str]:
    """The store and the one object whose name ends so."""
    at = bringing.opened(url)
    (found,) = [each for each in at.find() if each.endswith(name)]
    return at, found


def test_documents_and_the_weights_of_the_best_come(
    tuppence: Tuppence, there: str, tmp_path: Path
) -> None:
    code, _, err = tuppence("fetch", there)
    assert code == 0, err
    here = RunFolder(tmp_path / "runs" / "x")
    assert files_below(here.checkpoints) == {
        *("best.json", "last.json", "step_00000100/checkpoint.json"),
        *("step_00000100/model.safetensors", "step_00000100/state.json"),
    }
    assert here.read_json("run.json") == {"name": "x"}
    assert (here.tokenizer / "tokenizer.json").read_text() == "{}"
    assert len(list(here.rows("metrics"))) == 3
    path = checkpoint.choose(here, "best")
    checkpoint.verify(path)  # it is what its checkpoint.json says
    assert "attempt.json" not in files_below(here.path)  # nobody writes this one
    code, out, err = tuppence("fetch", there, "--json")
    told = json.loads(out)
    assert (told["files"], told["bytes"]) == (0, 0), "it was all here"


@pytest.mark.parametrize(
    ("which", "steps"), [("last", [200]), ("100", [100]), ("all", [100, 200]), ("none", [])]
)
def test_others_come_whole(
    tuppence: Tuppence, there: str, tmp_path: Path, which: str, steps: list[int]
) -> None:
    code, out, err = tuppence("fetch", there, "--checkpoint", which, "--out", "mine", "--json")
    assert code == 0, err
    here = RunFolder(tmp_path / "mine")
    assert [checkpoint.step_of(path) for path in checkpoint.complete(here)] == steps
    for path in checkpoint.complete(here):
        checkpoint.verify(path)
        assert (path / "optimizer.safetensors").exists()
    assert sorted(json.loads(out)["checkpoints"]) == [f"step_{step:08d}" for step in steps]


def test_a_checkpoint_that_is_not_there_is_one_line(tuppence: Tuppence, there: str) -> None:
    for which in ("150", "newest"):
        code, _, err = tuppence("fetch", there, "--checkpoint", which)
        assert code == 2
        assert "one of the steps 100, 200" in err


def test_weights_alone_become_whole_when_they_are_asked_for(
    tuppence: Tuppence, there: str, tmp_path: Path
) -> None:
    assert tuppence("fetch", there)[0] == 0
    here = RunFolder(tmp_path / "runs" / "x")
    with pytest.raises(UserError, match="--checkpoint last"):
        checkpoint.newest(here)
    assert tuppence("fetch", there, "--checkpoint", "100")[0] == 0
    found = checkpoint.newest(here).path
    assert found is not None
    assert checkpoint.step_of(found) == 100
    assert tuppence("fetch", there)[0] == 0  # and stay whole
    assert (found / "optimizer.safetensors").exists()


@pytest.mark.parametrize("harm", [harm_flip, harm_delete])
def test_a_damaged_file_is_named_and_nothing_half_stays(
    tuppence: Tuppence, there: str, tmp_path: Path, harm: Callable[[store.Store, str], None]
) -> None:
    at, name = object_of(there, "step_00000100/model.safetensors")
    harm(at, name)
    code, _, err = tuppence("fetch", there)
    assert code == 1
    assert "step_00000100" in err
    assert "model.safetensors" in err
    assert "there are steps 200" in err
    assert checkpoint.complete(RunFolder(tmp_path / "runs" / "x")) == []
    assert tuppence("fetch", there, "--checkpoint", "200")[0] == 0


def test_what_was_interrupted_goes_on_where_it_was(
    tuppence: Tuppence, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = store.Store.fetch
    came: list[str] = []

    def counted(self: store.Store, name: str, local: Path) -> None:
        if len(came) == stop:
            raise KeyboardInterrupt
        came.append(name)
        fetch(self, name, local)

    monkeypatch.setattr(store.Store, "fetch", counted)
    stop = 10**9
    assert tuppence("fetch", there, "--out", "straight", "--checkpoint", "all")[0] == 0
    whole, came[:] = list(came), []
    stop = len(whole) - 2
    assert tuppence("fetch", there, "--checkpoint", "all")[0] == 130
    done, came[:] = list(came), []
    stop = 10**9
    assert tuppence("fetch", there, "--checkpoint", "all")[0] == 0
    assert len(came) == len(whole) - len(done)
    straight = files_below(tmp_path / "straight")
    assert files_below(tmp_path / "runs" / "x") == straight
    for name in straight - {".fetched.json"}:
        two = ((tmp_path / part / name).read_bytes() for part in ("straight", "runs/x"))
        assert next(two) == next(two), name


def test_a_document_that_does_not_arrive_as_it_is_there_is_a_fault(
    tuppence: Tuppence, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(begun(tmp_path / "made" / "x"), s3)
    fetch = store.Store.fetch

    def torn(self: store.Store, name: str, local: Path) -> None:
        fetch(self, name, local)
        if name.endswith("plan.json"):
            local.write_bytes(local.read_bytes()[:-3])

    monkeypatch.setattr(store.Store, "fetch", torn)
    code, _, err = tuppence("fetch", s3)
    assert code == 1
    assert "plan.json" in err
    assert not (tmp_path / "runs" / "x" / "plan.json").exists()
    assert not (tmp_path / "runs" / "x" / "run.json").exists(), "no run folder by half"


def test_another_run_is_not_written_over(tuppence: Tuppence, there: str, tmp_path: Path) -> None:
    begun(tmp_path / "runs" / "x").close()
    before = {name: (tmp_path / "runs" / "x" / name).read_bytes() for name in ("run.json",)}
    code, _, err = tuppence("fetch", there)
    assert code == 2
    assert "--out DIR" in err
    assert {n: (tmp_path / "runs" / "x" / n).read_bytes() for n in before} == before
    assert tuppence("fetch", there, "--out", "mine")[0] == 0


def test_no_run_there_is_one_line(tuppence: Tuppence, s3: str) -> None:
    code, _, err = tuppence("fetch", s3)
    assert code == 2
    assert "no run" in err
    code, _, err = tuppence("fetch", "nothing")
    assert code == 2
    assert "no launch 'nothing'" in err


def test_a_launch_is_fetched_by_its_name_and_its_evaluations_too(
    tuppence: Tuppence, s3: str, tmp_path: Path
) -> None:
    folder = begun(tmp_path / "made" / "x")
    save(folder, 100, best=True)
    mirrored(folder, s3)
    store_at(s3).write("evaluations/best/bpb.json", b"{}")
    name, url = "x", s3.rpartition("/runs/")[0]
    launch = Launch(
        version=LAUNCH_VERSION,
        name=name,
        words=("shakespeare",),
        store=url,
        stages=(),
        budget=Budget(usd=1.0),
        kit="0" * 64,
        python=None,
        image=None,
        tasks=None,
        secrets=(),
        usd=Interval(1.0, 1.0, 1.0),
        phases={},
        prices_from="a test",
    )
    found = record.Record(record.VERSION, "sky", "started", launch, 0.0)
    record.write(tmp_path / "runs" / "x", found)
    code, _, err = tuppence("fetch", "x")
    assert code == 0, err
    assert "0 GB" not in err.split("fetched")[0]
    here = tmp_path / "runs" / "x"
    assert record.read(here) == found, "launch.json is this machine's"
    assert (here / "evaluations" / "best" / "bpb.json").read_text() == "{}"
    assert (here / "checkpoints" / "step_00000100" / "model.safetensors").exists()


def test_names_that_lead_out_of_the_folder_are_left(tuppence: Tuppence, s3: str) -> None:
    folder_names = {"../evil.json": "a/../evil.json", "run.json": "a/run.json"}
    assert bringing._plain(folder_names) == {"run.json": "a/run.json"}


def test_egress_is_said(tmp_path: Path) -> None:
    came = bringing.Came(bytes=10 * 10**9, files=3)
    usd = store_made.egress_usd(came.bytes, "s3://b/t")
    assert usd == pytest.approx(0.9)  # AWS's first tier, $0.09 a GB
    assert "$0.90 of egress" in bringing.words(came, tmp_path, usd)
    assert "of egress" not in bringing.words(came, tmp_path, store_made.egress_usd(9, "/disk"))
