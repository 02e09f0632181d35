"""A page that is one file: a template of assets/ with the house's style and script in it.

It asks nobody for anything: the policy in its head forbids every request, and every script but the
one that it has. Other reports fill templates of their own the same way.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib import resources

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)


def page(template: str, parts: Mapping[str, str]) -> str:
    """The template `assets/TEMPLATE` with its {{NAME}}s filled, each with HTML.

    STYLE, SCRIPT and POLICY are filled here. What is filled in is not looked at again.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"STYLE": _asset("page.css"), "SCRIPT": script, "POLICY": POLICY.format(script=digest)}
    filled = {**parts, **own}
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: filled[found[1]], _asset(template))


def tabs(name: str, panels: list[tuple[str, str]]) -> str:
    """Panels of which one shows, chosen by its title; `name` is their group's on the page."""
    chosen = "".join(
        f'<input type="radio" name="{name}" id="{name}-{number}"{" checked" * (number == 0)}>'
        f'<label for="{name}-{number}">{title}</label>'
        for number, (title, _) in enumerate(panels)
    )
    shown = "".join(f"<figure>{panel}</figure>" for _, panel in panels)
    return f'<div class="tabs">{chosen}{shown}</div>'


def _asset(name: str) -> str:
    return resources.files("tuppence").joinpath(f"assets/{name}").read_text(encoding="utf-8")
