"""The files of a dataset of the Hugging Face Hub, at one commit.

    hf://OWNER/NAME                        its parquet (or else JSONL, or text) for training
    hf://OWNER/NAME@REVISION/sample/10BT   a folder of it, at a branch, a tag or a commit
    hf://OWNER/NAME/sample-10BT            a configuration that its card names
    hf://OWNER/NAME/data/*.parquet         what matches

A dataset that is read by a script has no such files: then what the Hub converted to parquet is
taken, from the branch that it keeps for that.
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import unquote

from tuppence.errors import UserError
from tuppence.text import remote
from tuppence.text.folders import rule_of
from tuppence.text.inputs import InputFile, kind_of, some_of

CONVERTED = "refs/convert/parquet"
MAGIC = re.compile(r"[*?\[]")
TRAIN = {"train", "training"}
OTHER_SPLITS = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
# The best kind that there is: a dataset often has the same text in several.
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")
NOT_TEXT = re.compile(
    r"(^|/)(\.|readme|licen[cs]e|dataset_infos?\.json|state\.json)", re.IGNORECASE
)
_PLACE = re.compile(
    r"hf://(?:datasets/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+))?(?:/(?P<inside>.*))?"
)


class Place(NamedTuple):
    """What of the Hub is asked for; `revision` None is its main branch."""

    repository: str
    revision: str | None
    inside: str


class Listing(NamedTuple):
    """The files of a dataset at commit `sha`, and its card's configurations: patterns by name."""

    repository: str
    sha: str
    files: list[InputFile]
    configs: dict[str, list[str]]
    default: str | None


def place_of(source: str) -> Place:
    """The parts of an hf:// source. Raises UserError for what is none."""
    found = _PLACE.fullmatch(source.rstrip("/"))
    if found is None or found["repository"].partition("/")[0] in ("models", "spaces", "buckets"):
        raise UserError(f"{source}: a dataset of the Hub is hf://OWNER/NAME, or .../FOLDER in it")
    revision = unquote(found["revision"]) if found["revision"] else None
    return Place(found["repository"], revision, (found["inside"] or "").strip("/"))


def hub_files(source: str) -> list[InputFile]:
    """The files to train on, sorted by path. Raises UserError in one line where there are none."""
    place = place_of(source)
    with _told(source, place):
        listing = _listed(place)
        if not listing.files and place.inside:  # no such folder: what is there, then?
            listing = _listed(place._replace(inside=""))
        if not listing.files and place.revision is None:
            listing = _converted(place) or listing
    found = sorted(_chosen(source, place, listing), key=lambda file: file.path)
    if any("partial" in _words(file.path) for file in found) and "partial" not in place.inside:
        raise UserError(
            f"{source}: the Hub converted only a part of it; to train on that part, name its "
            f"folder: hf://{place.repository}@{CONVERTED}/{_inside(found[0]).rpartition('/')[0]}"
        )
    return found


# ---------------------------------------------------------------- which of them


def _chosen(source: str, place: Place, listing: Listing) -> list[InputFile]:
    files, inside = listing.files, place.inside
    if not inside:
        return _of_all(source, listing)
    if MAGIC.search(inside):
        found = _matching(files, [inside])
    else:
        found = [file for file in files if _inside(file) == inside]
        found = found or _preferred(f for f in files if _inside(f).startswith(f"{inside}/"))
        found = found or _preferred(_matching(files, listing.configs.get(inside, [])))
    if not found:
        there = listing.configs or sorted({_inside(file).partition("/")[0] for file in files})
        raise UserError(
            f"{source}: nothing to read there at commit {listing.sha[:12]}; it has {some_of(there)}"
        )
    return found


def _of_all(source: str, listing: Listing) -> list[InputFile]:
    """What a person means who names the dataset alone."""
    if not listing.files:
        suffixes = ", ".join(SUFFIXES)
        raise UserError(f"{source}: no files of a known kind at {listing.sha[:12]} ({suffixes})")
    if listing.default is not None:
        found = _preferred(_matching(listing.files, listing.configs[listing.default]))
        if found:
            return found
    found = _preferred(listing.files)
    names = set(listing.configs) or _folders(found)
    if len(names) > 1:
        raise UserError(
            f"{source} has several parts, {some_of(sorted(names))}: choose, for example "
            f"{source.rstrip('/')}/{min(names)}"
        )
    return found


def _preferred(files: Iterable[InputFile]) -> list[InputFile]:
    """Of the best kind there is, and for training where their names tell splits."""
    every = list(files)
    kinds = ([f for f in every if _plain(f).endswith(suffix)] for suffix in SUFFIXES)
    best: list[InputFile] = next((found for found in kinds if found), [])
    train = [file for file in best if _words(_inside(file)) & TRAIN]
    rest = [file for file in best if not _words(_inside(file)) & OTHER_SPLITS]
    return train or rest or best


def _folders(files: list[InputFile]) -> set[str]:
    """The folders that may be configurations: not those that only say what is in them."""
    tops = {_inside(file).rpartition("/")[0].partition("/")[0] for file in files}
    return {top for top in tops if top != "data" and not _words(top) & (TRAIN | OTHER_SPLITS)}


def _matching(files: list[InputFile], patterns: list[str]) -> list[InputFile]:
    rules = [rule_of(pattern) for pattern in patterns]
    return [file for file in files if any(rule.match(_inside(file)) for rule in rules)]


def _plain(file: InputFile) -> str:
    """Its name, without what says how it is compressed."""
    return file.path.lower().removesuffix(f".{file.compression}")


def _words(path: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", path.lower()))


def _inside(file: InputFile) -> str:
    """Its path in the dataset."""
    return file.path.partition("@")[2].partition("/")[2]


# ---------------------------------------------------------------- asking the Hub


def _listed(place: Place) -> Listing:
    """All files of known kinds, or those of the folder that is asked for."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="tuppence")
    info = _patient(
        lambda: api.dataset_info(
            place.repository, revision=place.revision, expand=["sha", "cardData"]
        )
    )
    sha, repository = str(info.sha), str(info.id)
    configs, default = _configs(info.card_data)
    patterns = configs.get(place.inside or default or "", [place.inside])
    entries = _tree(api, repository, sha, _common([_folder(pattern) for pattern in patterns]))
    files = [
        InputFile(path, path, *kind, int(entry.size), identity)
        for entry in entries
        if (kind := kind_of(entry.path)) and not NOT_TEXT.search(entry.path)
        for path in [f"hf://datasets/{repository}@{sha}/{entry.path}"]
        for identity in [f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"]
    ]
    return Listing(repository, sha, files, configs, default)


def _patient(do: Callable[[], Any]) -> Any:
    """What the Hub answers; asked again where it is busy."""
    for pause in (*remote.PAUSES[:3], None):
        try:
            return do()
        except Exception as error:  # each HTTP library has kinds of its own
            status = getattr(getattr(error, "response", None), "status_code", None)
            if pause is None or status not in remote.AGAIN:
                raise
            time.sleep(pause)


def _converted(place: Place) -> Listing | None:
    """What the Hub made of a dataset that a script reads, where it did."""
    from huggingface_hub import errors

    try:
        return _listed(place._replace(revision=CONVERTED))
    except errors.RevisionNotFoundError:
        return None


def _tree(api: Any, repository: str, sha: str, folder: str) -> list[Any]:
    """The files below a folder; none where there is no such folder."""
    from huggingface_hub import RepoFile, errors

    try:
        found = list(
            api.list_repo_tree(
                repository, folder or None, recursive=True, revision=sha, repo_type="dataset"
            )
        )
    except errors.EntryNotFoundError:
        return []
    return [entry for entry in found if isinstance(entry, RepoFile)]


def _folder(inside: str) -> str:
    """The deepest folder that has all that may be meant."""
    fixed = MAGIC.split(inside)[0]
    return inside if fixed == inside and not kind_of(inside) else fixed.rpartition("/")[0]


def _common(folders: list[str]) -> str:
    return posixpath.commonpath(folders) if all(folders) else ""


def _configs(card: Any) -> tuple[dict[str, list[str]], str | None]:
    """The card's configurations, each with the patterns of its training files, and the default."""
    found: dict[str, list[str]] = {}
    default = None
    for config in (card.to_dict() if card else {}).get("configs") or []:
        name = str(config.get("config_name", "default"))
        patterns = _patterns(config.get("data_files"))
        if not patterns:
            continue
        found[name] = patterns
        if config.get("default") or name == "default":
            default = name
    return found, next(iter(found)) if len(found) == 1 else default


def _patterns(data_files: Any) -> list[str]:
    """Paths and globs, from the forms that a card may have them in."""
    if isinstance(data_files, str):
        return [data_files]
    entries = [e if isinstance(e, dict) else {"path": e} for e in data_files or []]
    splits = {str(entry.get("split", "train")) for entry in entries}
    wanted = splits & TRAIN or splits - OTHER_SPLITS or splits
    paths = [entry["path"] for entry in entries if str(entry.get("split", "train")) in wanted]
    return [each for path in paths for each in ([path] if isinstance(path, str) else path)]


@contextmanager
def _told(source: str, place: Place) -> Iterator[None]:
    """One line and a remedy for all that the Hub's library raises."""
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(
            f"{source} needs a library that is not installed: pip install 'tuppence[hub]'"
        ) from None
    hub = constants.ENDPOINT
    page = f"{hub}/datasets/{place.repository}"
    try:
        yield
    except errors.GatedRepoError:
        why = f"is gated; accept its terms at {page}, then log in: hf auth login, or HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"has no revision {place.revision}; leave it out, or give a branch, tag or commit"
    except errors.RepositoryNotFoundError:
        why = f"is no dataset at {hub}, or a private one; check the name, or log in with HF_TOKEN"
    except errors.HFValidationError:
        why = "is no name of a dataset; it is hf://OWNER/NAME"
    except errors.OfflineModeIsEnabled:
        why = "cannot be asked for while HF_HUB_OFFLINE is set; unset it, or give files on disk"
    except Exception as error:  # each HTTP library has kinds of its own
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"cannot be asked for at {hub} ({said}); check the network, or HF_ENDPOINT"
    else:
        return
    raise UserError(f"{source} {why}") from None
