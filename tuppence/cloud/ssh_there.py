"""What a machine is asked before anything is sent, and what of its answers stands in the way."""

import re
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from tuppence.cloud.ssh_after import standing
from tuppence.cloud.ssh_host import Host
from tuppence.config import Run
from tuppence.errors import Fault, UserError

TORCH_GIB = 9.0  # that installing torch for a GPU takes
KIT_GIB = 0.1
NO_PYTHON = (
    "no Python >= 3.11 with pip, no uv and no curl there; install one of them, or give --python"
)


@dataclass(frozen=True)
class There:
    """What the machine answered before anything was sent."""

    host: Host
    folder: str
    maker: str
    python: str
    how: str
    gpus: tuple[str, ...]
    free_gib: float
    has_work: bool
    words: str | None
    status: dict[str, Any]


def probed(host: Host, args: Namespace, wanted: Run) -> There:
    """What is there; refused where it cannot carry a run."""
    folder = (args.folder or f"~/tuppence/{wanted.name}").removeprefix("~/").rstrip("/")
    told = host.ask("probe", folder, args.python or "")
    one = {key: values[-1] for key, values in told.items()}
    if "system" not in one:
        raise Fault(f"{host.name} did not answer; try: ssh {host.name} true")
    if one["system"] != "Linux":
        raise UserError(f"--ssh {host.name}: it runs {one['system']}, and a launch needs Linux")
    maker, _, python = one["maker"].partition(" ")
    there = There(
        host=host,
        folder=one["folder"],
        maker=maker,
        python=python,
        how=one["stays"],
        gpus=tuple(filter(None, one["gpus"].split(","))),
        free_gib=int(one["free_kib"]) / 2**20,
        has_work="work" in one,
        words=one.get("words"),
        status=standing(one, one["job"]) if "job" in one else {},
    )
    _refuse_there(there, one, wanted)
    return there


def _refuse_there(there: There, told: dict[str, str], wanted: Run) -> None:
    host, folder = there.host.name, there.folder
    if told["writable"] != "yes":
        raise UserError(
            f"{host}: {told['user']} may not write {folder}; give a folder with --folder"
        )
    if "foreign" in told:
        raise UserError(f"{host}: {folder} holds other things; give another --folder or name=")
    why = {
        "none": NO_PYTHON,
        "old": f"--python {there.python}: not a Python of 3.11 or newer there",
        "lacking": f"--python {there.python}: it lacks torch, numpy, safetensors, tokenizers, "
        f"tiktoken or pyarrow; install them, or leave --python out",
    }
    if there.maker in why:
        raise UserError(f"{host}: {why[there.maker]}")
    if there.how == "killed":
        raise UserError(
            f"{host} ends what a user runs when he logs out; say there once: loginctl enable-linger"
        )
    if there.how == "none":
        raise UserError(
            f"{host} has no tmux, no setsid and no lingering systemd; install tmux there"
        )
    _refuse_cards(there, wanted)


def _refuse_cards(there: There, wanted: Run) -> None:
    """Other cards than were asked for would take another time, and money, than was thought."""
    gpu, count = wanted.machine.gpu, wanted.machine.gpu_count
    got = ", ".join(sorted(set(there.gpus))) or "no GPU that nvidia-smi lists"
    if gpu is not None and not any(_is_card(gpu, card) for card in there.gpus):
        raise UserError(
            f"machine.gpu={gpu}: {there.host.name} has {got}; machine.gpu=none takes what is there"
        )
    if count is not None and count > len(there.gpus):
        raise UserError(
            f"machine.gpu_count={count}: {there.host.name} has {len(there.gpus)} ({got})"
        )


def _is_card(asked: str, card: str) -> bool:
    """Whether the driver's name is of this card: H100-SXM is NVIDIA H100 80GB HBM3 there."""
    words = re.findall(r"[a-z0-9]+", asked.lower())
    model = next((word for word in words if any(c.isdigit() for c in word)), asked.lower())
    return model in re.sub(r"[^a-z0-9]", "", card.lower())


def over(there: There, name: str, words: str) -> str | None:
    """What to say of a run that is over there already. Raises UserError where it runs."""
    host, status = there.host.name, there.status
    if not status:
        return None
    if status["state"] == "running":
        raise UserError(
            f"{name} is running on {host}; see it with tuppence status {name} or tuppence logs "
            f"{name} --follow, end it with tuppence stop {name}"
        )
    if status["state"] != "finished":
        return None
    if there.words != words:
        raise UserError(
            f"{name} is finished on {host}, and was begun with other words; say name=..."
        )
    return f"{name} is finished on {host}; nothing to do (tuppence fetch {name} brings it here)"


def refuse_small(there: There, wanted: Run, text_bytes: int) -> None:
    install = TORCH_GIB if there.maker == "node" and not there.has_work else 0.0
    data = text_bytes / 2**30
    asked = wanted.machine.disk_gb or 0.0
    need = KIT_GIB + install + data + asked
    if there.free_gib < need:
        raise UserError(
            f"{there.host.name}: {there.free_gib:.1f} GiB are free at {there.folder}, and "
            f"{need:.1f} are needed (packages {install:g}, text {data:.1f}, run {asked:g}); make "
            f"room, or give a folder on another disk with --folder"
        )
