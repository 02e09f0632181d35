"""What machines elsewhere are told of a run: words, secrets, and the texts that only we see.

    recipe k=v machine.gpu=H100  ──▶  RECIPE k=v machine.gpu=none name=NAME model.depth=12

What is chosen here is said in full there, so that what was priced is what is trained.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tuppence import config, recipes
from tuppence.cloud import machines
from tuppence.cloud.launch import STAGES
from tuppence.cloud.store_made import opened
from tuppence.config import Machine, Run, nearest
from tuppence.errors import UserError
from tuppence.files import file_sha256
from tuppence.plan.options import Option
from tuppence.store import is_url

KEPT_MACHINE = ("machine.disk_gb", "machine.threads")  # of machine.*, what machines are told
AWS_NAMES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"),
)
TEXTS = "texts"


# ---------------------------------------------------------------- words


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, where one is named, and the overrides. Raises UserError for two recipes."""
    specs = [word for word in words if "=" not in word]
    if len(specs) > 1:
        raise UserError(f"{specs[1]}: a launch is of one recipe, and {specs[0]} was named already")
    return (specs[0] if specs else None), [word for word in words if "=" in word]


def recipe_file(spec: str) -> Path | None:
    """The person's own file among the words, which travels with the code."""
    return Path(spec.rpartition(":")[0] or spec) if ".py" in spec else None


def words_of(
    spec: str, overrides: Sequence[str], run: Run, option: Option, *, source: str | None
) -> tuple[str, ...]:
    """The words for a machine that is there already: without what names a machine, with what was
    chosen here (`option`), and with the texts where they are by then (`source`)."""
    kept = [w for w in overrides if not _left_out(w.partition("=")[0].strip(), source)]
    return (spec, *kept, *_unset(str(run.recipe)), *_chosen(run, option), *_placed(run, source))


def _left_out(key: str, source: str | None) -> bool:
    if key == "data.source":
        return source is not None
    return key in ("name", "data.tokenizer") or (
        key.startswith("machine.") and key not in KEPT_MACHINE
    )


def _unset(spec: str) -> list[str]:
    """A recipe's own machine is the one that was rented: nothing is to be looked for there."""
    machine = recipes.get(spec).machine
    keys = (f"machine.{key}" for key, value in vars(machine).items() if value is not None)
    return [f"{key}=none" for key in keys if key not in KEPT_MACHINE]


def _chosen(run: Run, option: Option) -> list[str]:
    """What the planner chose where the person did not: vocabulary, size, batch."""
    tokenizer = [f"data.tokenizer={run.data.tokenizer}"] if run.data.tokenizer else []
    return [*tokenizer, *machines.words_of(run, option)]


def _placed(run: Run, source: str | None) -> list[str]:
    return [*([f"data.source={source}"] if source else []), f"name={run.name}"]


# ---------------------------------------------------------------- stages


def stages_named(text: str | None, tasks: str | None) -> tuple[str, ...]:
    """The stages that are asked for, in their order. Raises UserError."""
    if text is None:
        return STAGES if tasks else STAGES[:2]
    named = [word.strip() for word in text.split(",") if word.strip()]
    for word in named:
        if word not in STAGES:
            raise UserError(f"--stages {text}: no stage {word!r}{nearest(word, list(STAGES))}")
    if "train" not in named:
        raise UserError(f"--stages {text}: a launch trains; tuppence prepare and eval do the rest")
    if tasks and "eval" not in named:
        raise UserError(f"--tasks {tasks}: the stage eval asks them; add it to --stages {text}")
    return tuple(stage for stage in STAGES if stage in named)


# ---------------------------------------------------------------- secrets


def secrets_of(
    run: Run, store: str, clouds: Iterable[str], *, planned_only: bool = False
) -> tuple[str, ...]:
    """Names of the environment variables that the machines need. Raises UserError where one that
    cannot be done without is not set here, unless nothing is to be started."""
    from tuppence.text.corpora import CORPORA

    names = []
    if run.train.wandb == "online":
        if "WANDB_API_KEY" not in os.environ and not planned_only:
            raise UserError(
                "train.wandb=online needs WANDB_API_KEY on the machines: export it here, or say "
                "train.wandb=offline"
            )
        names.append("WANDB_API_KEY")
    source = run.data.source or ""
    if "HF_TOKEN" in os.environ and (source.startswith("hf://") or source in CORPORA):
        names.append("HF_TOKEN")
    elsewhere = any(cloud != "aws" for cloud in clouds) or "AWS_ENDPOINT_URL" in os.environ
    if store.startswith("s3://") and elsewhere:
        names += [name for name in AWS_NAMES if name in os.environ]
    return tuple(names)


# ---------------------------------------------------------------- what only this machine sees


@dataclass(frozen=True)
class Texts:
    """Files of this machine that are sent to the store, by the name that each will have there."""

    files: dict[str, Path]
    folder: str

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())

    def source(self, store: str) -> str:
        """`data.source` for the machines: the one file, or the folder, read in the same order."""
        only = next(iter(self.files)) if len(self.files) == 1 else ""
        return f"{store}/{self.folder}/{only}"

    def sent(self, store: str) -> bool:
        """Whether all of it is there."""
        place = opened(f"{store}/{self.folder}")
        return all(place.holds(name, place.digest(path)) for name, path in self.files.items())

    def send(self, store: str) -> bool:
        """Send what is not there; True where something was sent."""
        place, sent = opened(f"{store}/{self.folder}"), False
        for name, path in self.files.items():
            digest = place.digest(path)
            if not place.holds(name, digest):
                place.send(path, name, digest)
                sent = True
        return sent


def texts_of(run: Run, store: str) -> Texts | None:
    """The run's text where it lies on this machine. Raises UserError for what cannot be sent: other
    things that only this machine sees."""
    for key, value in {
        "train.init_from": run.train.init_from,
        "train.core_data": run.train.core_data,
        "train.hellaswag_data": run.train.hellaswag_data,
        "data.tokenizer": run.data.tokenizer,
    }.items():
        if value and not is_url(value) and Path(value).exists() and not _seen(value, store):
            raise UserError(
                f"{key}={value} is on this machine, which rented machines do not see; put it on "
                f"a bucket or a Hub, or leave it out"
            )
    source = run.data.source or ""
    if is_url(source) or _known(source) or _seen(source, store):
        return None
    from tuppence.text.sources import find_files

    if Path(source).is_dir() and (Path(source) / "manifest.json").exists():
        raise UserError(
            f"data.source={source} are shards on this machine; send them to the store and name "
            f"them there: data.source={store}/data/{Path(source).name}"
        )
    found = find_files(source)
    if any(is_url(str(file.path)) for file in found):
        raise UserError(f"data.source={source}: of this machine and of elsewhere; put all in one")
    paths = [Path(file.path) for file in found]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    numbered = len(paths) > 1  # folders are read sorted by name
    files = {f"{i:05d}-{p.name}" if numbered else p.name: p for i, p in enumerate(paths)}
    return Texts(files, f"{TEXTS}/{digest.hexdigest()[:16]}")


def _known(source: str) -> bool:
    from tuppence.text.corpora import CORPORA
    from tuppence.text.sources import CORPORA as SHIPPED

    return source in SHIPPED or (source in CORPORA and not Path(source).exists())


def _seen(path: str, store: str) -> bool:
    """Whether a path lies on the store's own disk, which the machines see."""
    there = not is_url(store) and Path(store).is_absolute()
    return there and Path(path).resolve().is_relative_to(store)


def trained_there(run: Run, words: Sequence[str]) -> Run:
    """The run as a machine reads these words: to be checked here, before anything is rented."""
    spec, overrides = split(words)
    there = config.override(recipes.get(spec or recipes.DEFAULT), overrides)
    return replace(there, machine=Machine(), data=replace(there.data, source=run.data.source))
