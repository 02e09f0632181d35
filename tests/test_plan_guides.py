"""The five published guides: their own figures from their premises, and what arithmetic says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tuppence import recipes
from tuppence.plan.claims import Claim, depth_of
from tuppence.plan.guides import RECIPES, guide
from tuppence.plan.table import guide_text

PUBLISHED = Path(__file__).parent.parent / "bench" / "published" / "claims.csv"


def claim(recipe: str, what: str) -> Claim:
    found = guide(recipe)
    assert found is not None
    return next(c for c in found.claims if c.what == what)


def test_every_guide_is_a_recipe_and_no_other_recipe_is_a_guide() -> None:
    assert set(RECIPES) <= recipes.all_recipes().keys()
    assert {name for name in recipes.all_recipes() if guide(name)} == set(RECIPES)


@pytest.mark.parametrize(
    ("recipe", "what", "arithmetic"),
    [
        ("nanogpt_openwebtext", "training time", 93.67),
        ("nanogpt_openwebtext", "passes over the corpus", 32.6),
        ("nanogpt_4b_tokens", "MFU", 61.07),
        ("nanogpt_4b_tokens", "speed", 49_976),
        ("nanogpt_4b_tokens", "training tokens", 2.949),
        ("nanogpt_4b_tokens", "training time", 16.4),
        ("nanogpt_4b_tokens", "on g5.8xlarge", 40.1),
        ("looped_546m", "parameters", 546.2),
        ("looped_546m", "work a token", 7.29),
        ("looped_546m", "10B tokens on 1 A10G", 723),
        ("looped_546m", "10B tokens on 8 V100", 51),
        ("looped_546m", "10B tokens on 8 A100", 20.3),
        ("looped_546m", "training tokens", 2.80),
        ("llmc_gpt2_124m", "training time", 94.3),
        ("llmc_gpt2_124m", "cost", 22.0),
        ("llmc_gpt2_124m", "8 H100 over 8 A100", 2.14),
        ("depth_1000usd", "parameters of depth 64", 12.9),
        ("depth_1000usd", "memory a GPU", 102),
        ("depth_1000usd", "training time", 116),
        ("depth_1000usd", "cost", 3_710),
        ("depth_1000usd", "tokens a step", 65_536),
        ("depth_1000usd", "checkpoint", 103),
        ("depth_1000usd", "passes over 350M tokens", 34.4),
    ],
)
def test_what_arithmetic_says(recipe: str, what: str, arithmetic: float) -> None:
    assert claim(recipe, what).arithmetic == pytest.approx(arithmetic, rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "what", "published"),
    [
        ("nanogpt_openwebtext", "preparation", 4.08),
        ("nanogpt_openwebtext", "storage", 10.0),
        ("nanogpt_openwebtext", "training", 3172.80),
        ("nanogpt_4b_tokens", "MFU", 13.70),
        ("looped_546m", "parameters", 546.0),
        ("llmc_gpt2_124m", "cost", 22.0),
        ("depth_1000usd", "training time", 31.0),
        ("depth_1000usd", "cost", 992.0),
        ("depth_1000usd", "tokens a step", 524_288.0),
        ("depth_1000usd", "checkpoint", 17.1),
    ],
)
def test_what_the_guides_own_premises_give(recipe: str, what: str, published: float) -> None:
    assert claim(recipe, what).as_published == pytest.approx(published, rel=0.002)


def test_each_wrong_claim_has_its_code_and_no_right_one() -> None:
    codes = {name: {c.code for c in told.claims} for name in RECIPES if (told := guide(name))}
    assert codes["nanogpt_openwebtext"] >= {"stale_price", "epochs_16"}
    assert codes["nanogpt_4b_tokens"] >= {
        "mfu_without_peak",
        "tokens_not_steps",
        "losses_not_comparable",
    }
    assert codes["looped_546m"] >= {
        "loops_left_out",
        "faster_than_possible",
        "bf16_unsupported",
        "wrong_machine",
    }
    assert codes["llmc_gpt2_124m"] == {None}  # it is right
    assert codes["depth_1000usd"] >= {
        "rule_of_thumb_params",
        "replicated_state",
        "faster_than_possible",
        "batch_mismatch",
        "checkpoint_vs_disk",
        "epochs_16",
        "no_wall_clock_stop",
    }


def test_4_3_billion_is_depth_44_to_45() -> None:
    assert 44 < depth_of(4.3e9) < 45
    assert depth_of(12 * 24 * 1536**2) == pytest.approx(24)


def test_the_impossible_shares_are_those_of_the_published_table() -> None:
    """MFUs above 100% in the table of published claims, recomputed from the guides' own hours."""
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for row, what in (("claim-002-a10g", "1 A10G"), ("claim-002-v100", "8 V100")):
        share = float(rows[row]["d_mfu_bf16_pct"]) / 100
        assert f"{share:.1f}x" in claim("looped_546m", f"10B tokens on {what}").why


def test_the_roofline_stands_beside_the_fixed_mfu() -> None:
    for what in ("1 A10G", "8 V100", "8 A100"):
        why = claim("looped_546m", f"10B tokens on {what}").why
        assert "40% of it" in why
        assert "the roofline says" in why


def test_a_guide_as_text_shows_said_premises_and_arithmetic() -> None:
    told = guide("depth_1000usd")
    assert told is not None
    text = guide_text(told)
    assert "said  its premises give  arithmetic says" in text
    assert text.count("faster_than_possible") == 2
    assert all(c.why in text for c in told.claims)
