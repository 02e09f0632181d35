"""The receipt: what was promised against what was paid. A pure reader of the run folder.

plan.json (promised)  +  ledger, metrics, evals, events (paid)  ──▶  receipt.{json,md,html}
"""

from tuppence.folder import RunFolder, write_text
from tuppence.report import history
from tuppence.report.account import Document, build
from tuppence.report.history import History
from tuppence.report.page import as_html
from tuppence.report.text import as_markdown, as_text

__all__ = ["as_html", "as_markdown", "as_text", "build", "kept", "write"]


def write(folder: RunFolder) -> Document:
    """Build the receipt and write it as JSON, Markdown and HTML into the run folder."""
    steps = history.read(folder)
    told = build(folder, steps)
    _keep(folder, told, steps)
    return told


def kept(folder: RunFolder) -> tuple[Document, str]:
    """The receipt, and why its files are not renewed: a full disk, a folder to read only."""
    steps = history.read(folder)
    told = build(folder, steps)
    try:
        _keep(folder, told, steps)
    except OSError as error:
        return told, error.strerror or str(error)
    return told, ""


def _keep(folder: RunFolder, told: Document, steps: History) -> None:
    folder.write_json("receipt.json", told)
    write_text(folder.file("receipt.md"), as_markdown(told))
    write_text(folder.file("receipt.html"), as_html(told, steps))
