"""Where a run's figures go besides its own files: TensorBoard, and W&B. See tracking.py.

Both belong to a thread of their own, in which what they need is imported.
"""

import html
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from tuppence import config
from tuppence.config import Plan
from tuppence.folder import RunFolder

INIT_SECONDS = 10.0  # for W&B to be reached
UPLOAD_SECONDS = 2.0  # at the end, for what W&B has not sent
Setting = float | str | bool
Told = Callable[[str, str, str], None]  # a code, what is amiss, what to do


def settings(folder: RunFolder, plan: Plan) -> dict[str, Setting]:
    """What was asked, and the numbers that runs are told apart by."""
    asked = config.asked(folder.run()) if folder.exists() else {}
    solved = {
        "plan.family": plan.model.family,
        "plan.params": plan.model.params,
        "plan.flops_per_token": plan.model.flops_per_token,
        "plan.batch_tokens": plan.step.batch_tokens,
        "plan.optimizer": plan.optimizer.name,
        "plan.learning_rate": plan.optimizer.learning_rate,
        "plan.machine": plan.machine.name,
        "plan.peak_tflops": plan.machine.peak_tflops,
        "plan.usd_per_hour": plan.machine.usd_per_hour,
    }
    return {**asked, **solved}


class TensorBoard:
    """RUN/tensorboard/. A step is one event with all its values, where TensorBoard's own writer has
    an event a value; what is flushed are whole records, so that a kill leaves a file to be read."""

    seconds = 0.1

    def __init__(self, folder: RunFolder, plan: Plan, *, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto, self._summary, self._text = event_pb2, summary_pb2.Summary, text_pb
        self._records = RecordWriter(_event_file(folder))
        self._add(0, file_version="brain.Event:2")
        self.back(step + 1)
        told = settings(folder, plan)
        self._add(0, summary=hparams_pb(told))
        rows = "".join(f"| {key} | {value} |\n" for key, value in told.items())
        table = f"| {plan.name} | |\n|---|---|\n{rows}"
        self._add(step, summary=text_pb("run", table))
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event."""
        found = [self._summary.Value(tag=tag, simple_value=one) for tag, one in values.items()]
        self._add(step, summary=self._summary(value=found))

    def sample(self, step: int, text: str) -> None:
        """As code, so that nothing in it is Markdown."""
        code = "".join(f"    {line}\n" for line in text.split("\n"))
        self._add(step, summary=self._text("sample", code))

    def back(self, step: int) -> None:
        """Readers drop what they have from this step on."""
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add(step, session_log=start)

    def flush(self) -> None:
        """To the disk."""
        self._records.flush()

    def close(self, summary: Mapping[str, float]) -> None:
        """The file says it all already."""
        self._records.close()

    def _add(self, step: int, **what: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), step=step, **what)
        self._records.write(event.SerializeToString())


def _event_file(folder: RunFolder) -> BinaryIO:
    """A new one: an attempt's. Names sort as they were made."""
    place = folder.file("tensorboard")
    place.mkdir(parents=True, exist_ok=True)
    number = len(list(place.glob("*.tfevents.*")))
    name = f"{int(time.time()):010d}.{number:05d}.{platform.node()}.{os.getpid()}"
    return (place / f"events.out.tfevents.{name}").open("xb")


class Wandb:
    """RUN/wandb/, and the same online. All attempts are one run of W&B's."""

    seconds = 1.0

    def __init__(self, folder: RunFolder, plan: Plan, told: Told) -> None:
        import wandb

        self._html, mode = wandb.Html, plan.track.wandb
        start = {
            "project": plan.track.wandb_project,
            "name": plan.name,
            "id": _id(folder),
            "dir": str(folder.path),
            "config": settings(folder, plan),
        }
        try:
            self._run = _begun(wandb, start, str(mode))
        except Exception as error:
            if mode != "online":
                raise
            first = str(error).strip().partition("\n")[0]
            told(
                "tracking_offline",
                f"W&B cannot be reached ({first}): figures are kept in {folder.file('wandb')}",
                "wandb sync sends them later",
            )
            self._run = _begun(wandb, start, "offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A row. The step is a figure like others, for W&B's own may not go back."""
        self._run.log({"step": step, **values})

    def sample(self, step: int, text: str) -> None:
        """As a page."""
        self._run.log({"step": step, "sample": self._html(f"<pre>{html.escape(text)}</pre>")})

    def back(self, step: int) -> None:
        """W&B cannot."""

    def flush(self) -> None:
        """W&B does so by itself."""

    def close(self, summary: Mapping[str, float]) -> None:
        """What the run came to."""
        self._run.summary.update(dict(summary))
        self._run.finish()


def _begun(wandb: Any, start: Mapping[str, Any], mode: str) -> Any:
    """W&B's run. It leaves stdout, signals and the machine's sensors alone."""
    quiet = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=UPLOAD_SECONDS,
    )
    wandb.setup(settings=quiet)
    if mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("no account: wandb login, or WANDB_API_KEY")
    return wandb.init(**start, mode=mode, resume="allow", settings=quiet)


def _id(folder: RunFolder) -> str:
    """The same for every attempt, wherever it runs: small documents go with the run."""
    kept = folder.read_json("wandb.json")
    if kept is None:
        kept = {"id": secrets.token_hex(6)}
        folder.write_json("wandb.json", kept)
    return str(kept["id"])
