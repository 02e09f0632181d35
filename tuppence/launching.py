"""The verb `launch`: the main job on rented machines, at the planned price, or not at all.

    words ─▶ plan ─▶ machines that can be had ─▶ today's prices ─▶ asked once ─▶ launch.json
          ─▶ bucket ─▶ code ─▶ tasks ─▶ SkyPilot's managed job ─▶ followed ─▶ fetched, nothing left

All that can be refused is refused before anything is made; what a failure leaves is ended, and
said. `--dry-run` and `--to-yaml` stop before the first thing that is made, and ask no cloud.
"""

import dataclasses
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuppence import config, following, planning
from tuppence.cloud import (
    asked,
    beside,
    deciding,
    earlier,
    kit,
    machines,
    record,
    shown,
    store_made,
    tasks,
)
from tuppence.cloud import sky as skypilot
from tuppence.cloud.launch import LAUNCH_VERSION, Launch, Stage
from tuppence.cloud.record import Record
from tuppence.cloud.sky import Sky
from tuppence.config import Interval, Run
from tuppence.errors import UserError
from tuppence.live import folded, screen_width
from tuppence.pipeline import asked as asked_here
from tuppence.pipeline import refuse_warnings, say
from tuppence.plan.market import SKYPILOT
from tuppence.plan.options import Option
from tuppence.plan.stages import GB
from tuppence.plan.table import document, options_text, warnings_text
from tuppence.planning import Planned
from tuppence.store import Away, is_url

Document = dict[str, Any]
ROWS = 6  # of the table of options
BELOW = ("prepare", "store", "total $")  # its columns that the stages and the bill tell truer
CHOSEN = ("model.depth", "train.batch_tokens")  # words that the planner adds


@dataclass(frozen=True)
class Asked:
    """What the words ask for, before any cloud is asked. `folder` holds launch.json; `spec` is the
    recipe as machines name it; `texts` are sent to the store; `before` is an earlier launch that
    this one goes on with."""

    args: Namespace
    spec: str
    overrides: tuple[str, ...]
    planned: Planned
    stages: tuple[str, ...]
    store: str
    folder: Path
    texts: asked.Texts | None
    kit: kit.Kit
    before: Record | None = None

    @property
    def run(self) -> Run:
        return self.planned.run

    @property
    def name(self) -> str:
        return str(self.run.name)


def launch(args: Namespace) -> Document:
    """Plan it, show it, ask once, start it, follow it, fetch it."""
    if args.max_price_rise < 0:
        raise UserError(f"--max-price-rise {args.max_price_rise:g}: a share, such as 0.1")
    if args.ssh:
        return _by_ssh(args)
    wanted = _asked(args)
    if args.dry_run or args.to_yaml:
        made = _decided(wanted, None)
        _show(wanted, made, None)
        return _written(wanted, made) if args.to_yaml else _dry(wanted, made)
    before = record.read(wanted.folder)
    sky = skypilot.found(args.sky or (before.sky if before else None))
    try:
        if earlier.is_over(wanted.folder, before, sky):
            return _said_done(wanted)
        wanted = replace(wanted, before=before)
        made = _decided(wanted, sky)
        _show(wanted, made, sky)
        following.warn_of_keys(made)
        confirm(args, f"start it, for {shown.expected(made)}?")
        start = following.Start(args, made, wanted.folder, wanted.kit, wanted.texts, before)
        return following.go(start, sky)
    except Away as error:
        raise UserError(f"{error}; check the network, then run the same command") from error


def confirm(args: Namespace, question: str) -> None:
    """Ask once before money is spent. Raises UserError where nobody says yes."""
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nothing was started: nobody can be asked here; --yes starts it unasked")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("nothing was started")


# ---------------------------------------------------------------- asked


def _asked(args: Namespace) -> Asked:
    """The words, planned on rented machines. Raises UserError for what cannot be launched."""
    if is_url(args.runs):
        raise UserError(f"--runs {args.runs}: a folder here; the run itself goes to --store")
    stages = asked.stages_named(args.stages, args.tasks)
    spec, overrides = asked.split(args.words)
    overrides += _infra_words(args, overrides)
    store = _store_of(args)
    planned = _planned(args, spec, overrides)
    spec = str(planned.run.recipe)
    packed = kit.make_kit(asked.recipe_file(spec))
    if packed.recipe is not None:
        spec = packed.recipe + (f":{spec.rpartition(':')[2]}" if ".py:" in spec else "")
    return Asked(
        args=args,
        spec=spec,
        overrides=tuple(overrides),
        planned=planned,
        stages=stages,
        store=store,
        folder=Path(args.runs) / str(planned.run.name),
        texts=asked.texts_of(planned.run, store),
        kit=packed,
    )


def _planned(args: Namespace, spec: str | None, overrides: list[str]) -> Planned:
    words = [*([spec] if spec else []), *overrides]
    (found,) = planning.planned(Namespace(**{**vars(args), "words": words}), here=False)
    refuse_warnings(found.warnings if found.chosen else (), args)
    return found


def _store_of(args: Namespace) -> str:
    """Where things go; a dry run needs none."""
    if args.store:
        return store_made.check(args.store)
    if args.dry_run:
        say(f"note      --store is not given: {store_made.STAND_IN} stands for it here")
        return store_made.STAND_IN
    raise UserError(
        "say where code, data and the run go: --store s3://my-bucket/tuppence (or gs://..., or a "
        "folder that the machines share)"
    )


def _infra_words(args: Namespace, overrides: list[str]) -> list[str]:
    """`--infra aws/us-east-1` names the cloud for the plan as well."""
    if not args.infra:
        return []
    cloud = args.infra.partition("/")[0].lower()
    if cloud not in SKYPILOT:
        raise UserError(f"--infra {args.infra}{config.nearest(cloud, list(SKYPILOT))}")
    said = [w.partition("=")[2].lower() for w in overrides if w.startswith("machine.cloud=")]
    if said and said[-1] != cloud:
        raise UserError(f"--infra {args.infra} and machine.cloud={said[-1]}: name one of the two")
    return [] if said else [f"machine.cloud={cloud}"]


# ---------------------------------------------------------------- what was before


def _said_done(wanted: Asked) -> Document:
    say(
        f"{wanted.name} is finished; nothing to do (tuppence fetch {wanted.name} brings it, "
        f"name=... is another run)"
    )
    return {"name": wanted.name, "finished": True}


def _words_of(wanted: Asked, option: Option) -> tuple[str, ...]:
    """What the machines are told; a run that goes on is told what it was told before. Raises
    UserError where that was something else."""
    source = wanted.texts.source(wanted.store) if wanted.texts else None
    given = (wanted.spec, wanted.overrides, wanted.run)
    words = asked.words_of(*given, option, source=source)
    if wanted.before is None:
        return words
    there = wanted.before.launch
    if there.store != wanted.store:
        raise UserError(f"{wanted.name} was launched with --store {there.store}: go on with that")
    odd = [w for w in {*words} ^ {*there.words} if w.partition("=")[0] not in CHOSEN]
    if odd:
        raise UserError(
            f"{wanted.name} was launched with other words ({min(odd)}); give this one a name "
            f"(name=...)"
        )
    return there.words


# ---------------------------------------------------------------- decided


def _decided(wanted: Asked, sky: Sky | None) -> Launch:
    """The machines and the whole launch; with `sky` only what can be had now, at today's price."""
    planned, args = wanted.planned, wanted.args
    region = _region(args)

    def stages_of(options: Sequence[Option], clouds: deciding.Clouds) -> tuple[Stage, ...]:
        found = machines.stages_of(
            planned.run,
            planned.data,
            planned.book,
            options,
            wanted=wanted.stages,
            tasks=args.tasks,
            prepared="prepare" not in wanted.stages,
            clouds=clouds,
            built=bool(args.python or args.image),
            apart=args.apart,
        )
        return (
            found if region is None else tuple(deciding.in_region(stage, region) for stage in found)
        )

    found = deciding.decide(
        _offered(wanted), stages_of, sky, most_rise=args.max_price_rise, say=say
    )
    words = _words_of(wanted, found.option)
    if wanted.kit.recipe is None and (
        why := planning.why_not_trained(asked.trained_there(wanted.run, words))
    ):
        raise why
    return _launch_of(wanted, found, words)


def _region(args: Namespace) -> str | None:
    return (args.infra or "").partition("/")[2] or None


def _offered(wanted: Asked) -> list[Option]:
    return deciding.offered(wanted.planned.options, _region(wanted.args))


def _launch_of(wanted: Asked, found: deciding.Decided, words: tuple[str, ...]) -> Launch:
    """All that was decided, frozen."""
    option, args = found.option, wanted.args
    assert option.usd is not None
    assert option.stages is not None
    stages = tuple(_repriced(wanted, found, stage) for stage in found.stages)
    beside_them = beside.beside(wanted.store, stages, option, wanted.planned.data)
    usd = sum(stage.usd for stage in stages) + sum(beside_them.values())
    fixed = wanted.run.budget.usd is not None  # the clock holds what the machine may cost
    mid = option.usd.mid
    low, high = (0.0, 0.0) if fixed else (option.usd.low - mid, option.usd.high - mid)
    rented = {machine.cloud for stage in found.stages for machine in stage.machines}
    apart = [stage.usd for stage in stages if stage.does == ("prepare",)]
    phases = {**option.stages.usd, **beside_them} | ({"prepare": apart[0]} if apart else {})
    if not any("prepare" in stage.does for stage in stages):
        phases["prepare"] = 0.0
    return Launch(
        version=LAUNCH_VERSION,
        name=wanted.name,
        words=words,
        store=wanted.store,
        stages=stages,
        budget=wanted.run.budget,
        kit=wanted.kit.sha,
        python=args.python,
        image=args.image,
        tasks=(args.tasks or "bpb") if "eval" in wanted.stages else None,
        secrets=asked.secrets_of(
            wanted.run, wanted.store, rented, planned_only=bool(args.dry_run or args.to_yaml)
        ),
        usd=Interval(max(0.0, usd + low), usd, usd + high),
        phases=phases,
        prices_from=option.seller.offer.source,
    )


def _repriced(wanted: Asked, found: deciding.Decided, stage: Stage) -> Stage:
    """Training of fixed work costs more at a higher price; that of a budget in dollars does not."""
    if "train" not in stage.does:
        return stage
    rise = stage.machines[0].usd_per_hour / found.option.seller.usd_per_hour
    usd = stage.usd * (1.0 if wanted.run.budget.usd is not None else rise)
    return replace(stage, usd=usd, beside_usd=stage.beside_usd * rise)


# ---------------------------------------------------------------- shown


def _show(wanted: Asked, made: Launch, sky: Sky | None) -> None:
    """The plan, the stages and the bill, before anybody is asked."""
    if wanted.args.json:
        return
    told = None
    if sky is not None:
        told = sky.ask("controller", clouds=sorted({s.machines[0].cloud for s in made.stages}))
    planned = wanted.planned
    train = next(stage for stage in made.stages if "train" in stage.does)
    offered, out = deciding.from_chosen(_offered(wanted), train.machines)
    left = [f"left out  {n} that would be better: {why}" for why, n in out.items()]
    parts = [
        options_text(
            [document(option) for option in offered],
            rows=ROWS,
            width=screen_width(),
            more="tuppence plan --all shows them",
            without=BELOW,
        ),
        "\n".join(left),
        shown.stages_text(made),
        shown.bill_text(
            made, kept=_kept(wanted, made), controller=shown.controller_text(made, told)
        ),
        warnings_text([w for w in planned.warnings if w.code != "beside_budget"]),
    ]
    print(folded("\n\n".join(part for part in parts if part)), flush=True)


def _kept(wanted: Asked, made: Launch) -> store_made.Stored:
    """What will be stored: shards and checkpoints as planned, and what is sent."""
    train = next(stage for stage in made.stages if "train" in stage.does)
    offered, _ = deciding.from_chosen(_offered(wanted), train.machines)
    runs = round(offered[0].disk_gb * GB)
    sent = wanted.texts.bytes if wanted.texts else 0
    return store_made.priced({"data and run": runs, "texts": sent}, made.store)


def _dry(wanted: Asked, made: Launch) -> Document:
    """What would be made, and the tasks; nothing is."""
    documents = tasks.documents(made)
    would = shown.would_make(made, texts=wanted.texts.folder if wanted.texts else None)
    if not wanted.args.json:
        print("\n" + "\n".join(f"would make  {each}" for each in would))
        print("\n" + tasks.yaml_text(documents, made), flush=True)
    return {**_told(made), "dry_run": True, "would_make": would, "tasks": documents}


def _written(wanted: Asked, made: Launch) -> Document:
    """The tasks, the code and how to run them, in a folder."""
    folder = Path(wanted.args.to_yaml)
    documents = tasks.documents(made)
    files = {f"{made.name}.yaml": tasks.yaml_text(documents, made)}
    for number, stage in enumerate(made.stages, 1):
        one = [document for document in documents if document["name"].endswith(f"-{stage.name}")]
        files[f"{made.name}-{number}-{stage.name}.yaml"] = tasks.yaml_text(one, made)
    texts = wanted.texts.folder if wanted.texts else None
    files["README.md"] = shown.readme(made, texts=texts)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to-yaml {folder} is there already; name a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    kit.send_kit(str(folder.resolve()), wanted.kit)
    if wanted.texts:
        for name, path in wanted.texts.files.items():
            there = folder / wanted.texts.folder / name
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, there)
    say(f"--to-yaml: {folder}: {', '.join(files)}; nothing was made or started elsewhere")
    return {**_told(made), "folder": str(folder), "files": sorted(files), "tasks": documents}


def _told(made: Launch) -> Document:
    return {"name": made.name, "run_url": f"{made.store}/runs/{made.name}"} | {
        "launch": dataclasses.asdict(made)
    }


# ---------------------------------------------------------------- by ssh


def _by_ssh(args: Namespace) -> Document:
    """The same job on a machine that a person has."""
    from tuppence.cloud.ssh import launch_ssh

    for option in ("sky", "image", "infra", "to_yaml"):
        if getattr(args, option):
            raise UserError(f"--{option.replace('_', '-')} is of rented machines; leave out --ssh")
    run = asked_here(args)
    return launch_ssh(args, run, say=say, confirm=lambda text: _agreed(args, text))


def _agreed(args: Namespace, text: str) -> None:
    say(text)
    confirm(args, "start it there?")
