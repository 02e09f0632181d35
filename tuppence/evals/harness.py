"""Any task of lm-evaluation-harness, asked of a model through our own passes.

    harness: task ──requests──▶ Asked   nats of continuations and of whole texts, texts continued
             metrics ◀─answers──          through evals.score: batched, stems shared, over all ranks

What a task is, how its prompts read and how its answers are judged is the harness's; texts become
ids as its own model of transformers does it: a pair of context and continuation is encoded as one
text and cut behind as many ids as the context has alone; of what is too long the last `context`
ids are read.
"""

import contextlib
import difflib
import functools
import importlib.metadata
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tuppence.errors import UserError
from tuppence.evals import score
from tuppence.evals.foreign import HubText
from tuppence.evals.items import Ask
from tuppence.evals.proceed import Wanted, proceed
from tuppence.evals.subject import Subject
from tuppence.ranks import ALONE, Ranks

Document = dict[str, Any]
Pair = tuple[list[int], list[int]]

VERSION = 1  # of the document
SHOT_SEED = 1234  # by which the harness draws examples, unless it is told otherwise
BOOTSTRAPS = 1000  # of a metric whose error has no formula
NEW_TOKENS = 256  # of a continuation whose task does not say, as in the harness


def run(
    subject: Subject,
    names: Sequence[str],
    *,
    include: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch: int | None = None,
    ranks: Ranks = ALONE,
    tick: Callable[[], None] = lambda: None,
) -> Document:
    """What the harness makes of its tasks or groups, the first `limit` items of each task.

    `include` is a folder of tasks of one's own, `shots` the number of examples where a task leaves
    it open. Raises UserError where the harness, a task or its data are not to be had.
    """
    lm_eval = library()
    # where --json prints, tasks may not
    with contextlib.redirect_stdout(sys.stderr), _without_bars():
        tasks = load(names, include=include, shots=shots)
        asked = Asked(subject, batch=batch, ranks=ranks, tick=tick)
        _seed()
        found = lm_eval.evaluate(
            asked, tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False
        )
    return {
        "metric": "lm_eval",
        "version": VERSION,
        "harness": version(),
        "limit": limit,
        "tasks": [_row(name, found) for name in found["results"]],
    }


# ---------------------------------------------------------------- the harness


def library() -> Any:
    """lm_eval. Raises UserError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"lm_eval tasks need lm-evaluation-harness: pip install 'tuppence[harness]' ({error})"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars: the harness's and those of datasets are tqdm's, and ask for themselves."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    init = tqdm.__init__

    @functools.wraps(init)
    def hidden(self: Any, *args: Any, **words: Any) -> None:
        init(self, *args, **{**words, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = init


def version() -> str:
    return importlib.metadata.version("lm_eval")


def load(names: Sequence[str], *, include: str | None, shots: int | None = None) -> dict[str, Any]:
    """The tasks with their data, as the harness's `evaluate` takes them."""
    manager = _manager(names, include)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # of the task's own code, of datasets, and of the way to them
            raise UserError(_unloadable(name, error)) from None
        for part, held in loaded.items():
            held.update(found[part])
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"lm_eval:{name} runs code that a model writes; it is not run here")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"lm_eval:{name} asks about more than text")
        given = task.get_config("num_fewshot")
        if given is None or (shots is not None and given != 0):  # 0 is a task's own decision
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SHOT_SEED)
    return loaded


def _manager(names: Sequence[str], include: str | None) -> Any:
    """The index that has the names; the harness's own thousands only where they are needed."""
    managers = library().tasks.TaskManager
    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"--lm-eval-include {include}: no such folder")
        own = managers(include_path=include, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = managers(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "see lm_eval ls tasks"
            raise UserError(f"lm_eval:{name}: lm_eval {version()} has no such task; {hint}")
    return manager


def _unloadable(name: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (
        f"lm_eval:{name}: the task or its data cannot be loaded here "
        f"({type(error).__name__}: {reason[:200]}); where there is no network, its dataset must "
        f"be in the Hub's cache already"
    )


def _seed() -> None:
    """What tasks draw is drawn from the harness's own seeds."""
    random.seed(0)
    np.random.seed(SHOT_SEED)
    torch.manual_seed(SHOT_SEED)


def _row(name: str, found: dict[str, Any]) -> Document:
    """A task, or a group of several, with each of its metrics and their errors."""
    told, metrics = found["results"][name], {}
    for key, value in told.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        label = metric if kept == "none" else f"{metric} ({kept})"
        error = told.get(f"{metric}_stderr,{kept}")
        metrics[label] = {"value": _number(value), "error": _number(error)}
    samples = found["n-samples"].get(name)
    count = samples["effective"] if samples else told.get("sample_len")
    return {
        "task": name,
        "version": found["versions"].get(name),
        "shots": found["n-shot"].get(name),
        "n": count,
        "metrics": metrics,
    }


def _number(value: Any) -> float | None:
    """None for what is none: the harness writes N/A for an error that it has not."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------- the model


class Asked:
    """A subject as the harness asks a model: by methods, with lists of its requests."""

    rank, world_size = 0, 1  # to the harness: every rank gets all requests and hears all answers

    def __init__(
        self,
        subject: Subject,
        *,
        batch: int | None = None,
        ranks: Ranks = ALONE,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._subject, self._batch, self._ranks, self._tick = subject, batch, ranks, tick
        self._known: dict[str, list[int]] = {}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of a continuation behind a context: log-likelihood, and whether it is the greedy one.
        What is asked of one document is asked together, for it begins alike."""
        pairs = [self._pair(*request.args) for request in requests]
        documents: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            documents.setdefault((request.task_name, request.doc_id), []).append(i)
        self._known.clear()
        return self._answers(pairs, list(documents.values()))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of whole texts, in windows that do not overlap but for one id."""
        pairs: list[Pair] = []
        windows: list[list[int]] = []
        for request in requests:
            own = list(self._windows(request.args[0]))
            windows.append([*range(len(pairs), len(pairs) + len(own))])
            pairs += own
        found = self._answers(pairs, [[i] for i in range(len(pairs))])
        return [sum(found[i][0] for i in own) for own in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each context, up to the first of its stops."""
        wanted = [self._wanted(*request.args) for request in requests]
        return proceed(self._subject, wanted, batch=self._batch, ranks=self._ranks, tick=self._tick)

    def _answers(self, pairs: list[Pair], groups: list[list[int]]) -> list[tuple[float, bool]]:
        """Of pairs of ids; those of a group may share how they begin."""
        asked = [
            (number, [Ask(pairs[i][0] + pairs[i][1], len(pairs[i][1])) for i in group])
            for number, group in enumerate(groups)
        ]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for number, got in score.answers(
            self._subject,
            asked,
            batch=self._batch,
            keep=self._subject.context + 1,  # the last id is asked for and not read
            ranks=self._ranks,
            tick=self._tick,
        ):
            for i, answer in zip(groups[number], got, strict=True):
                found[i] = (-answer.nats, answer.greedy)
        return found

    # ------------------------------------------------------------ text to ids

    def _pair(self, context: str, continuation: str) -> Pair:
        """Ids of both. Spaces at the context's end belong to the continuation's first word."""
        if context == "":
            ids = self._subject.text.encode_batch([continuation])[0]
            start = self._start()
            return ([start], ids) if ids[:1] != [start] else (ids[:1], ids[1:])
        bare = context.rstrip()
        before = self._ids(bare)
        return before, self._ids(context + continuation)[len(before) :]

    def _windows(self, text: str) -> Iterator[Pair]:
        from lm_eval import utils

        for window in utils.get_rolling_token_windows(
            token_list=self._ids(text),
            prefix_token=self._start(),
            max_seq_len=self._subject.context,
            context_len=1,
        ):
            yield utils.make_disjoint_window(window)

    def _ids(self, text: str) -> list[int]:
        """As the tokenizer begins a text by itself. What a document's requests share is encoded
        once."""
        if text not in self._known:
            reader = self._subject.text
            ids = reader.encode_batch([text])[0]
            if isinstance(reader, HubText) and reader.adds_start and ids[:1] != [reader.start]:
                ids = [self._start(), *ids]
            self._known[text] = ids
        return self._known[text]

    def _start(self) -> int:
        start = self._subject.text.start
        if start is None:
            raise UserError(
                "lm_eval: this model's tokenizer has no end-of-text, which the task needs to begin "
                "a text with"
            )
        return start

    def _wanted(self, context: str, asked: dict[str, Any]) -> Wanted:
        """A context and how it goes on."""
        words = dict(asked)
        until = words.pop("until", None) or []
        counts = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        given = [words.pop(name, None) for name in counts]
        most = next((int(count) for count in given if count is not None), NEW_TOKENS)
        temperature, drawn = float(words.pop("temperature", 0.0)), words.pop("do_sample", None)
        top_k, top_p = words.pop("top_k", None), words.pop("top_p", None)
        if words.pop("num_beams", 1) != 1 or words:
            raise UserError(f"lm_eval: this version cannot continue a text as {asked} asks for")
        return Wanted(
            ids=self._ids(context) or [self._start()],
            most=most,
            until=tuple([until] if isinstance(until, str) else until),
            temperature=0.0 if drawn is False else temperature,
            top_k=top_k,
            top_p=top_p,
        )
