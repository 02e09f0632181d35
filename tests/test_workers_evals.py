"""Workers give the gradients of one model; evaluation and sampling give what one forward gives."""

import math
import time

import numpy as np
import pytest
import torch
from families import model_plan

from tuppence.evals.generate import generate, window_start
from tuppence.evals.loss import val_loss
from tuppence.model import build
from tuppence.workers import Workers

PLAN = model_plan(vocab_size=40, n_layer=2, n_head=2, sequence_len=32, bias=True, tied_head=False)


def workers_of(count: int) -> Workers:
    model = build(PLAN)
    model.init_weights(0)
    with torch.no_grad():  # sharper than an untrained model: choices differ and have no ties
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() >= 2 else 1)
    return Workers(model, count=count, device="cpu", precision="fp32")


def batch(rows: int) -> torch.Tensor:
    return torch.randint(40, (rows, 16), generator=torch.Generator().manual_seed(1))


def test_map_keeps_the_order_and_divides_the_work() -> None:
    workers = workers_of(3)
    seen: dict[int, int] = {}

    def work(model: torch.nn.Module, item: int) -> int:
        seen[item] = id(model)
        return item * item

    assert workers.map(work, range(8)) == [i * i for i in range(8)]
    assert [seen[i] for i in range(3)] == [seen[i] for i in range(3, 6)]
    assert len(set(seen.values())) == 3
    assert workers.map(work, []) == []


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_gradients_are_those_of_one_model(count: int) -> None:
    one, many, rows = workers_of(1), workers_of(count), batch(4)
    one.model(rows, rows).backward()
    for _ in range(2):  # twice: nothing is left over from the step before
        many.model.zero_grad(set_to_none=True)
        many.map(lambda model, row: (model(row, row) / 4).backward(), list(rows[:, None]))
        many.sum_gradients()
        for mine, other in zip(one.model.parameters(), many.model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_all_workers_see_an_update() -> None:
    workers, rows = workers_of(2), batch(1)
    with torch.no_grad():
        workers.model.wte.weight.add_(1.0)
        first, second = workers.map(lambda model, row: model(row).detach(), [rows, rows])
    assert torch.equal(first, second)
    untouched = workers_of(1)
    with torch.no_grad():
        assert not torch.allclose(first, untouched.model(rows))


def test_a_fault_in_a_worker_is_raised_here() -> None:
    def fail(model: torch.nn.Module, item: int) -> None:
        if item == 1:
            raise ArithmeticError("in worker one")

    with pytest.raises(ArithmeticError, match="in worker one"):
        workers_of(2).map(fail, [0, 1])


def windows(rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    inputs = batch(rows).numpy()
    targets = np.roll(inputs, -1, axis=1)
    targets[-1, 5:] = -1
    return [(inputs[i : i + 2], targets[i : i + 2]) for i in range(0, rows, 2)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_counts_every_target_once(count: int) -> None:
    workers = workers_of(count)
    token_bytes = np.full(40, 2)
    found = val_loss(workers, windows(10), of_tokens=149, token_bytes=token_bytes)
    assert found is not None
    nats, each = 0.0, []
    for inputs, targets in windows(10):
        with torch.no_grad():
            loss = workers.model(
                torch.from_numpy(inputs), torch.from_numpy(targets), reduction="sum"
            )
        nats += loss.item()
        each.append((loss.item(), int((targets >= 0).sum())))
    assert found.tokens == 10 * 16 - 11
    off = sum((total - found.loss * count) ** 2 for total, count in each)
    error = math.sqrt(off * len(each) / (len(each) - 1)) / found.tokens
    assert found.error == pytest.approx(error, rel=1e-4)
    assert error > 0
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-6)
    assert found.bpb == pytest.approx(found.loss / math.log(2) / 2, rel=1e-6)
    assert workers.model.training


def test_a_deadline_cuts_an_evaluation_short() -> None:
    past = time.monotonic() - 1
    kwargs = {"of_tokens": 149, "token_bytes": np.ones(40), "deadline": past}
    assert val_loss(workers_of(1), windows(10), **kwargs) is None
    ends = []

    def stop() -> None:
        ends.append(time.monotonic())
        if len(ends) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        val_loss(workers_of(1), windows(10), of_tokens=149, token_bytes=np.ones(40), tick=stop)


def test_greedy_sampling_is_the_argmax_of_the_full_forward() -> None:
    workers, prompt = workers_of(1), [3, 1, 4, 1, 5]
    ids = generate(workers, prompt, new_tokens=50, context=32, temperature=0)
    assert ids[:5] == prompt
    assert len(ids) == 55
    assert len(set(ids)) > 5
    for end in range(5, 55):
        with torch.no_grad():
            window = ids[window_start(end, 32) : end]
            logits = workers.model(torch.tensor([window]))[0, -1]
        assert ids[end] == int(logits.argmax())


def test_sampling_follows_its_seed_and_stops() -> None:
    workers = workers_of(1)

    def sample(seed: int, **kwargs: object) -> list[int]:
        return generate(workers, [1], new_tokens=40, context=32, seed=seed, **kwargs)  # type: ignore[arg-type]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert max(sample(1, vocab_size=10, temperature=5.0)) < 10
    first = sample(1)[1]
    assert sample(1, stop=first) == [1]
    assert sample(1, deadline=time.monotonic() - 1) == [1]
    assert sample(1, top_k=1) == generate(workers, [1], new_tokens=40, context=32, temperature=0)
