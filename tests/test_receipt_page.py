"""Receipts of real runs in a real browser: nothing is asked for, nothing is wrong, all is equal.

The browser is Debian's chromium, or the one that TUPPENCE_CHROMIUM names.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from canned_runs import STOP, canned_plan, fill
from families import on_one_thread
from small_runs import DEPTH, GPT2, LOOPED, finished

from tuppence import report
from tuppence.config import DataPlan, Run
from tuppence.data.prepare import prepare
from tuppence.folder import RunFolder
from tuppence.live import duration
from tuppence.plan.hardware import Calibration

CHROMIUM = os.environ.get("TUPPENCE_CHROMIUM") or shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FAMILIES = {"gpt2": GPT2, "depth": DEPTH, "looped": LOOPED}
EVALUATED = ["budget.steps=8", "train.eval_every=3", "train.sample_tokens=5"]

pytestmark = pytest.mark.browser
quiet = pytest.fixture(autouse=True, scope="module")(on_one_thread)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One for all tests of this file."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium, or name it in TUPPENCE_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@dataclass
class Seen:
    """A page, all that its console said, and all that it asked for, also in vain."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


Open = Callable[..., Seen]


@pytest.fixture
def look(browser: Any) -> Iterator[Open]:
    """Opens a run folder's receipt in a window of its own."""
    contexts = []

    def look(folder: RunFolder, *, width: int = 1280, **settings: Any) -> Seen:
        context = browser.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.on("console", lambda message: seen.said.append(message.text))
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.on("request", lambda request: seen.asked.append(request.url))
        failed = seen.refused
        seen.page.on("requestfailed", lambda request: failed.append((request.url, request.failure)))
        seen.page.goto(folder.file("receipt.html").resolve().as_uri())
        return seen

    yield look
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, calibration: Calibration, data_plan: DataPlan
) -> dict[str, RunFolder]:
    """A finished run of each family, with its receipt."""
    shards = prepare(source="shakespeare", tokenizer="char", root=tmp_path_factory.mktemp("data"))
    made = {}
    for family, words in FAMILIES.items():
        path = tmp_path_factory.mktemp("runs") / family
        words = [*words, *EVALUATED]
        made[family] = finished(path, words, data_plan, shards.folder, calibration)
        report.write(made[family])
    return made


@pytest.fixture
def stopped(
    tmp_path: Path, small_run: Run, data_plan: DataPlan, calibration: Calibration
) -> RunFolder:
    """A killed, resumed and early-stopped run made by hand, with hostile text and many events."""
    folder = RunFolder(tmp_path)
    fill(folder, canned_plan(small_run, data_plan, calibration))
    folder.event("early_stop", "validation has turned", **STOP)
    for number in range(100):
        folder.event("step_skipped", f"step {number} skipped: " + "long" * 60, step=number)
    row = {"step": 6, "attempt": 2, "fixed": True, "temperature": 0.0, "prompt": "<img src=x>"}
    folder.append(
        "samples", {**row, "text": "<img src=x>\x1b[2J\x00</pre><script>x()</script>" * 9}
    )
    suite = {"metric": "hellaswag", "version": 1, "n": 1000, "of_items": 10_042, "acc": 0.25}
    suite |= {"error": 0.0137, "acc_norm": 0.275, "error_norm": 0.0141, "precision": "bf16"}
    last = folder.latest("evals")[-1]
    folder.append("evals", {**last, "hellaswag": {**suite, "seconds": 1.0, "sha256": "e" * 64}})
    report.write(folder)
    folder.close()
    return folder


def number(text: str) -> tuple[float, float]:
    """A figure as a page shows it, and half of its last digit."""
    (digits,) = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
    mantissa, _, power = digits.replace(",", "").partition("e")
    scale = 10.0 ** int(power or 0) * (0.01 if "%" in text else 1.0)
    decimals = len(mantissa.partition(".")[2])
    return float(mantissa) * scale, 0.5000001 * 10.0**-decimals * scale


def figure(told: dict, key: str) -> Any:
    """What receipt.json says where a cell points."""
    first, last = key.split(".")
    if first != "phases":
        return told[first][last]
    if last == "all":
        return told["usd"]
    paid = [part["usd"] for part in told["phases"] if part["phase"] == last.replace("-", "_")]
    return paid[0] if paid else None


def cells(page: Any) -> list[tuple[str, str]]:
    """Every figure on the page with the name that it has in receipt.json."""
    return page.eval_on_selector_all(  # type: ignore[no-any-return]
        "[data-key]", "all => all.map(each => [each.dataset.key, each.textContent.trim()])"
    )


def figures_are_equal(page: Any, told: dict) -> set[str]:
    """Whether each figure is that of the document, as far as its digits go; the names of all."""
    found = cells(page)
    for key, text in found:
        value = figure(told, key)
        if value is None:
            assert text in ("", "-"), key
        elif key == "actual.hours":
            assert text == duration(value * 3600)
        else:
            shown, half = number(text)
            assert shown == pytest.approx(value, abs=half), (key, text)
    return {key for key, _ in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_runs_receipt_is_right_and_asks_for_nothing(
    runs: dict[str, RunFolder], look: Open, family: str
) -> None:
    folder = runs[family]
    told = json.loads(folder.file("receipt.json").read_text(encoding="utf-8"))
    seen = look(folder)
    assert seen.said == []
    assert seen.asked == [folder.file("receipt.html").resolve().as_uri()]
    keys = figures_are_equal(seen.page, told)
    assert keys >= {f"actual.{name}" for name in told["actual"]}
    assert keys >= {f"summary.{name}" for name in told["summary"]}
    assert keys >= {f"phases.{part['phase'].replace('_', '-')}" for part in told["phases"]}
    assert {"budget.spent", "summary.val_loss"} <= keys
    assert seen.page.locator("h1").inner_text() == family
    assert seen.page.locator(".tabs circle.dots").count() == 3 * len(told["evaluations"]) == 9
    assert seen.page.locator(".evaluations tbody tr").count() == 3


@pytest.mark.parametrize("settings", [{}, {"color_scheme": "dark"}, {"java_script_enabled": False}])
def test_it_reads_on_a_phone(stopped: RunFolder, look: Open, settings: dict[str, Any]) -> None:
    seen = look(stopped, width=390, **settings)
    assert seen.said == []
    assert len(seen.asked) == 1
    session = seen.page.context.new_cdp_session(seen.page)
    metrics = session.send("Page.getLayoutMetrics")
    assert metrics["cssContentSize"]["width"] == 390  # nothing is wider than the screen
    assert "Not spent: $0.0004" in seen.page.locator(".stopped").inner_text()
    assert seen.page.locator(".notes li").count() < 40
    edges = "all => Math.max(...all.map(each => each.getBoundingClientRect().right))"
    assert seen.page.eval_on_selector_all("table, svg, dl", edges) <= 390 - 15  # in the margin
    marks = seen.page.locator("svg.mark")
    assert marks.count() > 5
    assert all(marks.nth(place).is_visible() for place in range(marks.count()))


def test_it_is_light_and_dark(stopped: RunFolder, look: Open) -> None:
    shades = []
    for scheme in ("light", "dark"):
        page = look(stopped, color_scheme=scheme).page
        colours = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, "
            "getComputedStyle(document.body).color]"
        )
        shades.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours])
    (light_paper, light_ink), (dark_paper, dark_ink) = shades
    assert light_paper > 600 > 200 > light_ink
    assert dark_paper < 200 < 600 < dark_ink


def test_one_picture_shows_at_a_time_and_on_paper_all(
    runs: dict[str, RunFolder], look: Open
) -> None:
    page = look(runs["gpt2"], color_scheme="dark").page
    pictures = page.locator(".tabs > figure")

    def shown() -> list[bool]:
        return [pictures.nth(place).is_visible() for place in range(pictures.count())]

    assert shown() == [True, False, False]
    page.locator(".tabs > label").nth(1).click()
    assert shown() == [False, True, False]
    page.emulate_media(media="print")
    assert shown() == [True, True, True]
    assert not page.locator(".tabs > label").first.is_visible()
    paper = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink')")
    assert paper.strip() == "#1d1c1a"  # printed black on white, whatever the screen is
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_a_pointer_reads_the_curve(runs: dict[str, RunFolder], look: Open) -> None:
    page = look(runs["depth"]).page
    chart = page.locator(".tabs svg.chart").first
    assert page.locator("output").first.is_hidden()
    chart.hover()
    assert page.locator("output").first.is_visible()
    said = page.locator("output").first.inner_text()
    loss = re.search(r"training loss ([\d.]+)", said)
    assert loss is not None
    assert 0 < float(loss[1]) < 10
    page.mouse.move(1, 1)
    assert page.locator("output").first.is_hidden()


def test_what_others_wrote_does_nothing(stopped: RunFolder, look: Open) -> None:
    seen = look(stopped)
    assert seen.said == []
    assert len(seen.asked) == 1
    assert seen.page.locator("img").count() == 0
    assert seen.page.locator("script").count() == 1
    assert "</pre><script>x()</script>" in seen.page.locator(".said pre").first.inner_text()
    assert "\x1b" not in seen.page.content()
    figures_are_equal(seen.page, json.loads(stopped.file("receipt.json").read_text()))


def test_its_policy_forbids_scripts_and_requests(stopped: RunFolder, look: Open) -> None:
    page = stopped.file("receipt.html")
    hostile = "<script>window.ran = 1</script><img src='http://127.0.0.1:9/x.png'></main>"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", hostile), encoding="utf-8")
    seen = look(stopped)
    assert seen.page.evaluate("window.ran === undefined")
    seen.page.evaluate("fetch('http://127.0.0.1:9/').catch(() => null)")
    assert seen.refused == [("http://127.0.0.1:9/x.png", "csp")]
    assert "http://127.0.0.1:9/" not in seen.asked
    assert any("Content Security Policy" in said for said in seen.said)
