"""Loss laws: what they say, where they say nothing, and how they do on points left out."""

import csv
import json
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import pytest

from tuppence.plan import cost, loss

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import fit_loss  # noqa: E402
import published_loss  # noqa: E402

Rows = list[dict[str, str]]


@pytest.fixture(scope="session")
def rows() -> Rows:
    with fit_loss.PUBLISHED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def write(tmp_path: Path, rows: Rows) -> Callable[[Rows], Path]:
    def to_csv(some: Rows) -> Path:
        path = tmp_path / f"points{len(list(tmp_path.iterdir()))}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(some)
        return path

    return to_csv


def mid(name: str, **sizes: float) -> float:
    return loss.predict(loss.groups()[name], **sizes).interval.mid


# ---------------------------------------------------------------- what the laws say


def test_repeats_are_worth_less() -> None:
    assert loss.effective_tokens(4e9, 1e9) == pytest.approx(3.7e9, rel=0.01)
    assert loss.effective_tokens(16e9, 1e9) == pytest.approx(10.6e9, rel=0.01)
    assert loss.effective_tokens(34 * 350e6, 350e6) == pytest.approx(5.1e9, rel=0.01)  # guide 004
    assert loss.effective_tokens(1e9, 2e9) == loss.effective_tokens(1e9, None) == 1e9


def test_repeating_raises_the_loss_and_widens_the_interval() -> None:
    group = loss.groups()["openlm-c4_original"]
    fresh = loss.predict(group, params=124e6, tokens=40e9)
    four = loss.predict(group, params=124e6, tokens=40e9, unique_tokens=10e9)
    forty = loss.predict(group, params=124e6, tokens=40e9, unique_tokens=1e9)
    assert fresh.interval.mid < four.interval.mid < forty.interval.mid
    assert (fresh.epochs, four.epochs, forty.epochs) == (1, 4, 40)
    widths = [(p.interval.high - p.interval.low) / p.interval.mid for p in (fresh, four, forty)]
    assert widths[0] < widths[1] < widths[2]
    assert "40.0 epochs" in forty.why


def test_published_runs_come_back() -> None:
    gpt2 = 124e6
    assert mid("gpt2-fineweb", params=gpt2, tokens=10.26e9) == pytest.approx(3.272, rel=0.003)
    owt = mid("gpt2-owt", params=gpt2, tokens=294.9e9, unique_tokens=9.04e9)
    assert owt == pytest.approx(2.85, rel=0.01)
    for flops, best in ((1e18, 0.8972), (1e19, 0.7999)):  # nanochat's frontier, January 2026
        sizes = [10 ** (7.5 + i / 50) for i in range(80)]
        law = loss.groups()["nanochat-isoflop-jan26"].law
        found = min(law.at(params=n, tokens=flops / 7.1 / n)[0] for n in sizes)
        assert found == pytest.approx(best, rel=0.007)


def test_fineweb_is_harder_than_openwebtext_by_about_what_the_seeds_say() -> None:
    sizes = {"params": 124e6, "tokens": 2.95e9}
    assert 0.12 < mid("gpt2-fineweb", **sizes) - mid("gpt2-owt", **sizes) < 0.24


def test_a_better_recipe_needs_fewer_tokens() -> None:
    muon, adamw = loss.groups()["gpt2-fineweb-modded/modern"], loss.groups()["gpt2-fineweb"]
    assert 3 < muon.law.efficiency < 4.5  # 10.3B tokens of AdamW against 2.67B
    assert muon.law.at(params=124e6, tokens=2.67e9)[0] == pytest.approx(
        adamw.law.at(params=124e6, tokens=2.67e9 * muon.law.efficiency)[0]
    )


@pytest.mark.parametrize("name", sorted(loss.groups()))
def test_more_of_anything_helps(name: str) -> None:
    group = loss.groups()[name]
    n, d = group.params_range[1], group.tokens_range[1] or 1e10
    here = group.law.at(params=n, tokens=d)[0]
    assert group.law.floor < here
    for times in (2, 100):  # also far outside the points
        assert group.law.at(params=n, tokens=times * d)[0] <= here
        assert group.law.at(params=times * n, tokens=times * d)[0] <= here


def test_coupling_never_makes_more_of_anything_hurt() -> None:
    law = loss.groups()["nanochat-isoflop-jan26"].law
    assert law.coupling > 0
    longer = [law.at(params=42e6, tokens=3e10 * 10**i)[0] for i in range(5)]
    larger = [law.at(params=1e8 * 10**i, tokens=1e8)[0] for i in range(6)]
    assert longer == sorted(longer, reverse=True)
    assert larger == sorted(larger, reverse=True)


def test_a_run_that_ends_in_its_warm_up_is_worse_but_bounded() -> None:
    law = loss.groups()["openlm-rpj"].law
    whole, late = law.at(params=79e6, tokens=0.4e9)
    assert late > 0.1 * whole
    assert law.at(params=79e6, tokens=4e9)[1] < 0.01 * whole
    shortest, part = law.at(params=79e6, tokens=1e7)
    assert part == pytest.approx((shortest - law.at(params=79e6, tokens=1e15)[0]) / 2, rel=0.1)


# ---------------------------------------------------------------- intervals and words


def test_the_interval_widens_outside_the_points_and_says_so() -> None:
    group = loss.groups()["nanochat-isoflop-jan26"]
    inside = loss.predict(group, params=110_100_480, tokens=2e9)
    near = loss.predict(group, params=1e9, tokens=2e10)
    far = loss.predict(group, params=10e9, tokens=2e11)
    assert inside.extrapolation == 1
    assert near.extrapolation == pytest.approx(1e9 / group.params_range[1])
    share = [p.interval.high / p.interval.mid - 1 for p in (inside, near, far)]
    assert share[0] < share[1] < share[2]
    assert "outside" not in inside.why
    assert "outside" in near.why
    assert "a guess" in far.why
    assert "a guess" not in near.why


def test_a_new_size_is_less_sure_than_a_known_one() -> None:
    group = loss.groups()["nanochat-2026-climbmix-32k"]
    known = loss.predict(group, params=729_808_896, tokens=6e9)
    other = loss.predict(group, params=600_000_000, tokens=6e9)
    assert (
        other.interval.high / other.interval.mid > 1.005 * known.interval.high / known.interval.mid
    )


@pytest.mark.parametrize(
    ("source", "tokenizer", "family", "optimizer", "name"),
    [
        ("fineweb", "gpt2", "gpt2", "adamw", "gpt2-fineweb"),
        ("fineweb", "gpt2", "depth", "muon", "gpt2-fineweb-modded/modern"),
        ("openwebtext", "gpt2", "gpt2", "adamw", "gpt2-owt"),
        ("fineweb_edu", "bpe:32768", "depth", "muon", "nanochat-isoflop-jan26"),
        ("climbmix", "bpe:32768", "depth", "muon", "nanochat-2026-climbmix-32k"),
        ("c4", "gpt-neox", "gpt2", "adamw", "openlm-c4_original"),
        ("redpajama", "gpt-neox", "gpt2", "adamw", "openlm-rpj"),
        ("refinedweb", "gpt-neox", "gpt2", "adamw", "openlm-rw_original"),
        ("fineweb", "bpe:32768", "gpt2", "adamw", None),
        ("fineweb_edu", "bpe:32768", "looped", "muon", None),
        ("notes.txt", "gpt2", "gpt2", "adamw", None),
    ],
)
def test_a_run_finds_its_group_or_none(
    source: str, tokenizer: str, family: str, optimizer: str, name: str | None
) -> None:
    found = loss.find_group(source=source, tokenizer=tokenizer, family=family, optimizer=optimizer)
    assert (found.name if found else None) == name


def test_the_unknown_says_how_many_tokens_would_tell() -> None:
    words = loss.unknown(source="notes.txt", tokenizer="gpt2", params=1e8, tokens=1e11)
    assert "unknown data" in words
    assert "refit after 10,000,000,000 tokens" in words
    assert loss.refit_tokens(params=1e8, tokens=2e9) == 1e9  # ten a parameter


def test_what_cannot_be_compared() -> None:
    known = loss.groups()
    isoflop, later = known["nanochat-isoflop-jan26"], known["nanochat-2026-fwe-32k"]
    assert loss.comparable(isoflop, later) is None
    assert loss.comparable(known["openlm-rpj"], known["openlm-c4_original"]) is None  # one C4 val
    for a, b in (("gpt2-fineweb", "gpt2-owt"), ("openlm-rpj", "gpt2-fineweb")):
        reason = loss.comparable(known[a], known[b])
        assert reason is not None
        assert reason.startswith("not comparable")


def test_groups_count_parameters_as_their_points_do() -> None:
    shape = cost.gpt2(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, sequence_len=1024)
    group = loss.groups()["gpt2-fineweb"]
    assert group.params_of(shape) == pytest.approx(group.params_range[0], rel=0.002)
    assert loss.groups()["chinchilla-epoch-svg"].params_of(shape) == shape.params


def test_a_prediction_costs_microseconds_and_no_numpy() -> None:
    group = loss.groups()["openlm-rpj"]
    calls = 2000
    seconds = min(
        timeit.repeat(
            lambda: loss.predict(group, params=3e8, tokens=6e10, unique_tokens=1e10),
            number=calls,
            repeat=5,
        )
    )
    assert seconds / calls < 50e-6
    code = (
        "import sys; from tuppence.plan import loss; loss.groups(); print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- fitted and judged


def test_the_facts_are_what_the_fit_writes() -> None:
    points = fit_loss.read_points()
    made = fit_loss.document(
        fit_loss.as_groups(points, fit_loss.fit_all(points), fit_loss.spreads(points))
    )
    kept = json.loads(loss.FACTS.read_text(encoding="utf-8"))
    assert made["groups"].keys() == kept["groups"].keys()
    for name, row in made["groups"].items():
        other = kept["groups"][name]
        startup, kept_startup = row["law"].pop("startup"), other["law"].pop("startup")
        assert row["law"] == pytest.approx(other["law"], rel=1e-3)
        assert [pytest.approx(pair, rel=1e-3) for pair in kept_startup] == startup
        assert row["spread"] == pytest.approx(other["spread"], rel=0.02)
        assert (row["points"], row["source"]) == (other["points"], other["source"])


def test_rows_left_out_are_predicted_within_the_promise(
    rows: Rows, write: Callable[[Rows], Path]
) -> None:
    """Every fourth row held out, four times over: as the judge does."""
    errors, covered = [], 0
    for k in range(4):
        points = fit_loss.read_points(write([r for i, r in enumerate(rows) if i % 4 != k]))
        laws = fit_loss.as_groups(points, fit_loss.fit_all(points), fit_loss.spreads(points))
        for row in [r for i, r in enumerate(rows) if i % 4 == k]:
            found = published_loss.judge(row, laws)
            assert found is not None
            errors.append(found.error)
            covered += found.covered
    errors.sort()
    assert errors[len(errors) // 2] < 0.006
    assert errors[int(0.9 * len(errors))] < 0.03
    assert 0.72 <= covered / len(errors) <= 0.90


def test_the_score_of_the_shipped_laws() -> None:
    found = published_loss.score(fit_loss.PUBLISHED)
    assert (found["rows"], found["skipped"], found["uncalibrated"]["rows"]) == (344, 0, 0)
    assert found["median_error"] < 0.005
    assert found["groups"]["chinchilla-epoch-svg"]["rows"] == 183


def test_rows_are_skipped_only_for_want_of_shape_or_loss(
    rows: Rows, write: Callable[[Rows], Path]
) -> None:
    point = next(r for r in rows if r["id"] == "nc-isoflop-opt-4.64e+18")
    empty = dict.fromkeys(("n_total", "n_body_plus_head", "tokens", "layers", "dim"), "")
    flops_alone = point | empty
    nothing = flops_alone | {"train_flops": ""}
    no_loss = point | {"loss": "n/a"}
    found = published_loss.score(write([point, flops_alone, nothing, no_loss]))
    assert (found["rows"], found["skipped"]) == (2, 2)
    assert found["p90_error"] < 0.005

    shape = next(r for r in rows if r["id"] == "nc-iso-1e+19-d16")
    bare = shape | {"n_body_plus_head": "", "tokens": ""}  # layers, width and FLOPs are left
    assert published_loss.score(write([bare]))["median_error"] < 0.005


def test_unknown_groups_are_flagged_and_kept_out_of_the_totals(
    rows: Rows, write: Callable[[Rows], Path]
) -> None:
    c4 = next(r for r in rows if r["id"] == "openlm-c4_original-d=576_l=24_h=8-1.0")
    stranger = c4 | {"group": "openlm-pile", "train_data": "pile", "loss": "3.0"}
    found = published_loss.score(write([c4, stranger]))
    assert found["rows"] == 1
    assert found["uncalibrated"]["rows"] == 1
    assert list(found["uncalibrated"]["groups"]) == ["openlm-pile"]
    assert found["uncalibrated"]["median_error"] < 0.25
