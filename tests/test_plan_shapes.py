"""From the words to a shape: the dial, the families, what is refused; and the laws of size."""

from __future__ import annotations

import dataclasses
import math

import pytest
from families import data_plan

from tuppence.config import Model, Run, Train
from tuppence.errors import UserError
from tuppence.model.looped import draw_recurrence
from tuppence.plan import laws
from tuppence.plan.asked import solve_model
from tuppence.plan.shapes import (
    divisors,
    expected_recurrence,
    export_warnings,
    laid_out,
    nearest_divisor,
    shape_of,
    windows,
)

LOOPED = Model(
    family="looped",
    n_prelude=2,
    n_recurrent=3,
    n_coda=1,
    mean_recurrence=4,
    max_recurrence=16,
    n_embd=2304,
    n_head=18,
)


@pytest.mark.parametrize(
    ("depth", "width", "heads"), [(12, 768, 6), (24, 1536, 12), (44, 2816, 22), (45, 2880, 45)]
)
def test_the_dial_sets_width_and_heads(depth: int, width: int, heads: int) -> None:
    full = laid_out(Model(depth=depth))
    assert (full.family, full.n_layer, full.n_embd, full.n_head) == ("depth", depth, width, heads)
    assert full.sequence_len == 2048


def test_the_dial_of_gpt2_is_gpt2() -> None:
    full = laid_out(Model(family="gpt2", depth=12))
    assert (full.n_layer, full.n_embd, full.n_head, full.sequence_len) == (12, 768, 12, 1024)
    given = dataclasses.replace(full, vocab_size=50257)
    assert shape_of(given, 50257).params == 12 * (12 * 768**2 + 2 * 768) + (50257 + 1024 + 1) * 768


@pytest.mark.parametrize(
    ("tokens", "rows"), [(50257, 50304), (100277, 100352), (32768, 32768), (65, 65), (1023, 1023)]
)
def test_a_large_vocabulary_is_padded(tokens: int, rows: int) -> None:
    full = laid_out(Model(family="gpt2", depth=12))
    assert shape_of(full, tokens).vocab_size == rows


def test_guide_004_is_12_9_billion() -> None:
    shape = shape_of(Model(depth=64, exportable=True), 32)
    assert shape.params == 12 * 64 * 4096**2 + 2 * 32 * 4096
    assert shape.flops_per_token == 6 * shape.params_matmul + 12 * 64 * 4096 * 2048


def test_the_looped_family_counts_what_it_runs() -> None:
    shape = shape_of(LOOPED, 32768)
    assert shape.params == 546_179_328
    assert shape.flops_per_token == pytest.approx(7.2938e9, rel=1e-4)
    half = shape_of(Model(**{**vars(LOOPED), "backprop_depth": 2}), 32768)
    assert half.params == shape.params
    assert half.layers_kept == 9
    assert half.flops_per_token < shape.flops_per_token


def test_windows_shorten_attention_alone() -> None:
    full, short = (
        shape_of(Model(depth=8), 256),
        shape_of(Model(depth=8, window_pattern="SSSL"), 256),
    )
    assert full.params == short.params
    assert full.matmul_flops_per_token == short.matmul_flops_per_token
    assert short.attention_flops_per_token == full.attention_flops_per_token * (6 / 4 + 2) / 8
    assert windows("S", 3, 64) == (16, 16, 64)  # the last layer sees all
    assert windows(None, 3, 64) is None


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Model(family="gpt3", n_layer=1), ["gpt3", "gpt2, depth, looped"]),
        (Model(depth=0), ["model.depth=0", "at least 1"]),
        (Model(family="looped", depth=4), ["model.depth=4", "model.n_embd"]),
        (Model(depth=4, n_prelude=2), ["model.n_prelude=2", "it is of looped"]),
        (Model(depth=4, bias=True), ["model.bias=True", "it is of gpt2"]),
        (
            Model(family="gpt2", n_layer=2, window_pattern="L"),
            ["window_pattern=L", "it is of depth"],
        ),
        (Model(family="gpt2", n_layer=2), ["model.n_embd is not set"]),
        (
            Model(family="gpt2", n_layer=2, n_embd=64, n_head=5),
            ["n_head=5", "n_embd=65", "n_head=4"],
        ),
        (Model(depth=4, n_kv_head=3), ["model.n_kv_head=3", "model.n_head=2", "2"]),
        (Model(family="gpt2", depth=4, n_kv_head=1), ["n_kv_head=1", "n_head=4"]),
        (Model(depth=4, window_pattern="SXL"), ["SXL", "SSSL"]),
        (Model(**{**vars(LOOPED), "max_recurrence": 2}), ["mean_recurrence=4", "max_recurrence=2"]),
        (Model(**{**vars(LOOPED), "n_coda": None}), ["model.n_coda is not set"]),
        (Model(**{**vars(LOOPED), "n_recurrent": 0}), ["model.n_recurrent=0", "at least 1"]),
        (Model(depth=4, n_layer=6), ["model.depth=4", "model.n_layer=none"]),
        (Model(family="depth", n_layer=1, n_embd=66, n_head=2), ["heads of 33", "n_embd=68"]),
        (Model(**{**vars(LOOPED), "n_embd": 66, "n_head": 2}), ["heads of 33", "n_embd=68"]),
        (
            Model(family="depth", n_layer=1, n_embd=8, n_head=1),
            ["model.n_embd=8", "12", "model.value_embeddings=off"],
        ),
        (Model(**{**vars(LOOPED), "exportable": True}), ["model.exportable=on", "of its own"]),
    ],
)
def test_wrong_shapes_name_the_value_and_the_remedy(model: Model, says: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        shape_of(model, 1000)
    assert all(word in str(refusal.value) for word in says), refusal.value


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert [nearest_divisor(480, wanted) for wanted in (7, 9, 1000)] == [6, 8, 480]


# ---------------------------------------------------------------- laws


def test_depth_12_is_the_reference() -> None:
    twelve = shape_of(Model(depth=12, exportable=True), 32768)
    tokens = laws.horizon_tokens(twelve, "muon")
    assert tokens == 10.5 * (12 * 12 * 768**2 + 32768 * 768)
    found = laws.recipe(twelve, "muon", tokens)
    assert found.batch_tokens == 2**19
    assert found.learning_rate == pytest.approx(0.02)
    assert found.embedding_rate == pytest.approx(0.3)
    assert found.weight_decay == pytest.approx(0.28)


def test_larger_models_take_larger_batches_and_decay_less() -> None:
    """At depth 24: batch x (D / D_12)^0.383, rounded to a power of two; rates by its root."""
    shape = shape_of(Model(depth=24, exportable=True), 32768)
    tokens = laws.horizon_tokens(shape, "muon")
    found = laws.recipe(shape, "muon", tokens)
    assert found.batch_tokens == 2**20
    assert found.learning_rate == pytest.approx(0.02 * math.sqrt(2))
    assert found.embedding_rate == pytest.approx(0.3)  # sqrt(2) x (1536 / 768)^-0.5
    assert found.weight_decay == pytest.approx(0.28 * math.sqrt(2) * 110100480 / 729808896)


def test_small_batches_slow_muon_by_their_eighth_root_and_keep_rate_times_decay() -> None:
    shape = shape_of(Model(depth=4), 4096)
    found = laws.recipe(shape, "muon", 2e6, batch_tokens=2**13)
    assert found.learning_rate == pytest.approx(0.02 * 2 ** (-6 / 8))
    assert found.embedding_rate == pytest.approx(0.3 * 2**-3 * 3**0.5)
    other = laws.recipe(shape, "muon", 2e6, batch_tokens=2**14)
    twice = 2 * found.learning_rate * found.weight_decay  # a step of twice as many tokens
    assert other.learning_rate * other.weight_decay == pytest.approx(twice)
    short = laws.recipe(shape, "muon", 1e5, batch_tokens=2**14)
    assert short.learning_rate * short.weight_decay == pytest.approx(0.1)  # a tenth a step at most


def test_trained_weights_move_at_rates_in_proportion() -> None:
    found = laws.recipe(shape_of(Model(depth=4), 4096), "muon", 2e6)
    said = laws.overridden(
        found, Train(optimizer="muon", learning_rate=found.learning_rate / 100, init_from="x")
    )
    assert said.embedding_rate == pytest.approx(found.embedding_rate / 100)
    assert said.head_rate == pytest.approx(found.head_rate / 100)
    assert said.scalar_rate == pytest.approx(found.scalar_rate / 100)


def test_rates_that_are_said_stand() -> None:
    found = laws.recipe(shape_of(Model(depth=4), 4096), "muon", 2e6)
    said = laws.overridden(found, Train(optimizer="muon", learning_rate=0.5, head_rate=0.1))
    assert (said.learning_rate, said.head_rate) == (0.5, 0.1)
    assert said.embedding_rate == found.embedding_rate
    gpt2 = laws.recipe(shape_of(Model(family="gpt2", depth=4), 4096), "adamw", 2e6)
    alone = laws.overridden(gpt2, Train(learning_rate=0.5, head_rate=0.1))
    assert (alone.embedding_rate, alone.head_rate) == (0.5, 0.1)


def test_what_cannot_be_exported_is_said_or_refused() -> None:
    assert not export_warnings(Model(family="gpt2", n_layer=1, n_embd=8))
    assert not export_warnings(Model(depth=4, exportable=True))
    assert not export_warnings(Model(depth=4, exportable=True, window_pattern="L"))
    (said,) = export_warnings(Model(depth=4))
    assert said.code == "not_exportable"
    assert "value_embeddings or residual_scalars" in said.message
    plain = Model(depth=4, value_embeddings=False, residual_scalars=False, window_pattern="SL")
    assert "window_pattern" in export_warnings(plain)[0].message
    for odd in (Model(depth=4, value_embeddings=True), Model(depth=4, window_pattern="SL")):
        with pytest.raises(UserError, match="exportable=on"):
            shape_of(dataclasses.replace(odd, exportable=True), 100)


def test_the_mean_of_r_is_that_of_what_is_drawn() -> None:
    loop = solve_model(Run(model=LOOPED), data_plan(32768)).loop
    drawn = [draw_recurrence(loop, seed=0, step=step) for step in range(20_000)]
    assert expected_recurrence(loop) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    assert 4.4 < expected_recurrence(loop) < 4.6


def test_adamw_follows_its_own_rate_and_a_short_run_takes_small_batches() -> None:
    gpt2 = shape_of(Model(family="gpt2", depth=12), 50304)
    found = laws.recipe(gpt2, "adamw", 10e9)
    assert found.learning_rate == pytest.approx(6.4e-4, rel=0.01)  # GPT-3 small has 6e-4
    short = laws.recipe(gpt2, "adamw", 1e6)
    assert short.batch_tokens <= 1e6 / 100 * math.sqrt(2)
    assert short.batch_tokens % 1024 == 0
    smaller = laws.recipe(gpt2, "adamw", 1e6, batch_tokens=1024)
    assert smaller.batch_tokens == 1024
    assert smaller.learning_rate < short.learning_rate
