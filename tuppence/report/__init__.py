"""The receipt: what was promised against what was paid. A pure reader of the run folder.

plan.json (promised)  +  ledger, metrics, evals, events (paid)  ──▶  receipt.{json,md,html}
"""

from tuppence.folder import RunFolder, write_text
from tuppence.report.account import Document, build
from tuppence.report.page import as_html
from tuppence.report.text import as_markdown, as_text

__all__ = ["as_html", "as_markdown", "as_text", "build", "write"]


def write(folder: RunFolder) -> Document:
    """Build the receipt and write it as JSON, Markdown and HTML into the run folder."""
    metrics, evals = folder.latest("metrics"), folder.latest("evals")
    told = build(folder, metrics, evals)
    folder.write_json("receipt.json", told)
    write_text(folder.file("receipt.md"), as_markdown(told))
    write_text(folder.file("receipt.html"), as_html(told, metrics, evals))
    return told
