"""The guard: what is a spike and what is not, and where a run goes back to."""

import dataclasses
import json
import math
import random

import pytest

from tuppence import config
from tuppence.train.guard import (
    BAD_STEPS,
    LEAST,
    LOSS_MARGIN,
    NORM_MARGIN,
    REWIND_SHARE,
    WINDOW,
    Rewinds,
    Trouble,
    Window,
)


def window_of(losses: list[float], norms: list[float] | None = None) -> Window:
    window = Window()
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        window = window.seen(loss, norm)
    return window


def noisy(steps: int, *, mean: float = 3.0, sigma: float = 0.1) -> list[float]:
    drawn = random.Random(1)
    return [drawn.gauss(mean, sigma) for _ in range(steps)]


HEALTHY = window_of(noisy(WINDOW))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_from_the_first_step(bad: float) -> None:
    assert Window().judged(bad, 1.0) == f"loss {bad}"
    assert Window().judged(3.0, bad) == f"gradient norm {bad}"
    assert Window().judged(3.0, 1.0) is None


def test_a_loss_far_above_the_window_is_skipped_and_named() -> None:
    mean = math.fsum(HEALTHY.losses) / WINDOW
    why = HEALTHY.judged(9.1, 1.0)
    assert why is not None
    assert why.startswith("loss 9.1 is ")
    assert f"sigma above {mean:.4g}, the mean of 128 steps" in why
    assert 50 < float(why.split()[3]) < 70  # sigma is a tenth: (9.1 - 3) / 0.1
    assert HEALTHY.judged(0.1, 1.0) is None  # a fall is no spike


def test_six_sigma_is_the_border_where_noise_is_wide() -> None:
    losses = noisy(WINDOW, sigma=0.2)
    mean = math.fsum(losses) / WINDOW
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (WINDOW - 1))
    assert 6 * sigma > (LOSS_MARGIN - 1) * mean
    window = window_of(losses)
    assert window.judged(mean + 5.99 * sigma, 1.0) is None
    assert window.judged(mean + 6.01 * sigma, 1.0) is not None


@pytest.mark.parametrize("steady", [noisy(WINDOW, sigma=1e-4), [3.0] * WINDOW])
def test_the_margin_is_the_border_where_noise_is_narrow(steady: list[float]) -> None:
    window = window_of(steady)
    assert window.judged(0.999 * LOSS_MARGIN * 3, 1.0) is None
    assert window.judged(1.001 * LOSS_MARGIN * 3, 1.0) is not None
    assert window.judged(3.0, 0.999 * NORM_MARGIN) is None
    assert "gradient norm" in str(window.judged(3.0, 1.001 * NORM_MARGIN))


def test_few_steps_call_nothing_finite_a_spike() -> None:
    losses = noisy(LEAST)
    assert window_of(losses[:-1]).judged(50.0, 1e6) is None
    assert window_of(losses).judged(50.0, 1.0) is not None


def test_a_plateau_never_becomes_usual_but_a_new_level_of_taken_steps_does() -> None:
    assert all(HEALTHY.judged(7.0 + i / 1e3, 1.0) for i in range(500))
    assert window_of([*noisy(WINDOW), *noisy(WINDOW, mean=7.0)]).judged(7.0, 1.0) is None


@pytest.mark.parametrize("steps", [1, 5, 20, 40])
def test_a_climb_is_stopped_before_it_is_half_way(steps: int) -> None:
    window, climb = window_of(noisy(WINDOW, sigma=0.05)), noisy(steps, mean=0, sigma=0.05)
    for i in range(steps):
        if window.judged(loss := 3 + 4 * (i + 1) / steps + climb[i], 1.0):
            assert i < max(1, steps // 2)
            return
        window = window.seen(loss, 1.0)
    raise AssertionError("it climbed all the way")


def falling(steps: int, *, warm: float = 2.0, seed: int = 0) -> tuple[list[float], list[float]]:
    """As runs begin: losses fall fast and then slowly, norms jump up and come down."""
    drawn = random.Random(seed)
    losses = [1.5 + 4 * math.exp(-i / 40) + drawn.gauss(0, 0.03) for i in range(steps)]
    norms = [1 + warm * 8 * math.exp(-i / 20) * drawn.random() for i in range(steps)]
    return losses, norms


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_starts_is_left_alone(seed: int) -> None:
    window = Window()
    for loss, norm in zip(*falling(600, seed=seed), strict=True):
        assert window.judged(loss, norm) is None
        window = window.seen(loss, norm)


def test_a_window_holds_its_steps_alone_and_survives_json_bit_for_bit() -> None:
    window = window_of([*noisy(3), *noisy(WINDOW)], [*noisy(3), *noisy(WINDOW, mean=1e-7)])
    assert window.losses == tuple(noisy(WINDOW))
    assert len(window.norms) == WINDOW
    again = config.from_json(Window, json.dumps(dataclasses.asdict(window), allow_nan=False))
    assert again == window
    assert again.judged(3.5, 2e-7) == window.judged(3.5, 2e-7)


# ---------------------------------------------------------------- going back


def trouble(step: int, *, bad: int = BAD_STEPS, whole: int = 1000) -> Trouble:
    return Trouble(step, bad, step / whole, "loss nan")


def test_back_is_the_newest_step_whose_weights_are_older_than_the_failing_ones() -> None:
    saved = [400, 450, 495, 497, 500]  # 495 moved last; 497 and 500 were saved while skipping
    assert Rewinds().targets(trouble(500), saved) == [450, 400]


def test_the_batches_between_are_left_out_and_counted() -> None:
    rewinds = Rewinds().after(trouble(500), 450)
    assert rewinds.rewound_steps == 50
    assert [rewinds.batch(step) for step in (450, 451)] == [500, 501]
    again = rewinds.after(trouble(480), 460)
    assert again.rewound_steps == 70
    assert again.batch(460) == rewinds.batch(480)  # the next one that was never seen


def test_trouble_at_the_same_place_goes_back_farther() -> None:
    rewinds = Rewinds().after(trouble(500), 450)
    assert rewinds.targets(trouble(490), [440, 450, 470]) == [440]
    assert rewinds.targets(trouble(501, whole=2000), [440, 450, 470]) == [470, 450, 440]
    assert rewinds.after(trouble(490), 440).targets(trouble(470), [440, 460]) == []


def test_without_a_checkpoint_it_is_the_first_weights_or_the_end() -> None:
    assert Rewinds().targets(trouble(30), []) == [0]
    never_moved = trouble(BAD_STEPS)
    assert Rewinds().targets(never_moved, [2]) == []
    message = Rewinds().refusal(never_moved, [2], learning_rate=0.01)
    assert "no older weights" in message
    assert "delete the checkpoint of step 2" in message
    assert "loss nan" in message
    assert "Lower train.learning_rate=0.01" in message
    first_again = Rewinds().after(trouble(30), 0)
    assert first_again.targets(trouble(20), [10]) == []


def test_no_more_is_thrown_away_than_the_share() -> None:
    whole = 1000
    most = round(REWIND_SHARE * whole)
    assert Rewinds().targets(trouble(500, whole=whole), [500 - most]) == [500 - most]
    assert Rewinds().targets(trouble(500, whole=whole), [499 - most]) == []
    spent = Rewinds(rewound_steps=most - 20)
    assert spent.targets(trouble(500, whole=whole), [479, 480]) == [480]
    message = spent.refusal(trouble(500, whole=whole), [479], learning_rate=0.1)
    assert "more than 10% of the run (80 steps so far)" in message
    assert "none of the older" in spent.refusal(trouble(500), [480], learning_rate=0.1)
    assert "nothing older was saved" in Rewinds().refusal(trouble(5), [], learning_rate=0.1)


def test_a_run_that_keeps_failing_ends() -> None:
    """Whatever happens between, the steps thrown away stay within the share."""
    drawn, rewinds, step, whole = random.Random(3), Rewinds(), 0, 2000
    saved: list[int] = []
    for _ in range(10_000):
        step += drawn.randrange(BAD_STEPS, 60)
        now = trouble(step, whole=whole)
        targets = rewinds.targets(now, saved)
        if not targets or step >= whole:
            break
        rewinds, step = rewinds.after(now, targets[0]), targets[0]
        saved = [s for s in saved if s <= step] + [step + 5]
    else:
        raise AssertionError("it never ended")
    assert rewinds.rewound_steps <= REWIND_SHARE * whole
    assert rewinds.skipped_batches == rewinds.rewound_steps


def test_rewinds_survive_json() -> None:
    rewinds = Rewinds().after(trouble(500), 450)
    assert config.from_json(Rewinds, json.dumps(dataclasses.asdict(rewinds))) == rewinds
