"""A SkyPilot that says what a test wants: an executable that answers sky_driver.py's protocol.

    sky = FakeSky(tmp_path)
    sky.says("queue", {"jobs": [job(status="RUNNING")]}, {"jobs": []})   each asked once, the last
    sky.says("down", error("away", "no network"))                        again and again
    guarding.stop(args)  with args.sky = str(sky.python)
    assert sky.asked("down") == [{"cluster": "x-1"}]

An answer may hold, beside what is answered, "_stderr" (text), "_text" (stdout of `logs`), "_exit"
(a code, and no answer), "_sleep" (seconds). `effects` change other answers: after `down` was asked,
{"_then": {"clusters": {"clusters": []}}} replaces what `clusters` says.
"""

import json
import sys
from pathlib import Path
from typing import Any

SCRIPT = """#!{python}
import json, os, sys, time
folder, verb = {folder!r}, sys.argv[-1]
asked = json.loads(sys.stdin.read() or "{{}}")
with open(os.path.join(folder, "asked.jsonl"), "a") as calls:
    calls.write(json.dumps({{"verb": verb, "payload": asked}}) + "\\n")
path = os.path.join(folder, "answers.json")
answers = json.load(open(path))
queue = answers.get(verb)
if verb == "look" and not queue:  # made of the others' answers; the first error is the answer
    parts = {{each: answers[each].pop(0) if len(answers[each]) > 1 else dict(answers[each][0])
             for each in ("queue", "clusters", "costs")}}
    wrong = [part for part in parts.values() if "error" in part or "_exit" in part]
    jobs = [row for row in parts["queue"].get("jobs", []) if row["name"] in asked["names"]]
    held = parts["clusters"].get("clusters", [])
    mine = {{row["cluster"] for row in jobs}}
    queue = [wrong[0] if wrong else {{
        "jobs": jobs,
        "clusters": [row for row in held if row["name"] in mine],
        "controllers": [row for row in held if row["name"].startswith("sky-jobs-controller-")],
        "costs": [row for row in parts["costs"].get("clusters", []) if row["name"] in mine],
    }}]
if not queue:
    print(json.dumps({{"error": {{"code": "unknown", "message": "the test has no " + verb}}}}))
    sys.exit(1)
now = queue.pop(0) if len(queue) > 1 else dict(queue[0])
for other, answer in now.pop("_then", {{}}).items():
    answers[other] = [answer]
with open(path + ".new", "w") as out:
    json.dump(answers, out)
os.replace(path + ".new", path)
time.sleep(now.pop("_sleep", 0))
sys.stderr.write(now.pop("_stderr", ""))
if "_text" in now:
    sys.stdout.write(now.pop("_text"))
    sys.exit(now.get("_exit", 0))
if "_exit" in now:
    sys.exit(now["_exit"])
print(json.dumps(now))
sys.exit(1 if "error" in now else 0)
"""


class FakeSky:
    """Stands for a Python that has SkyPilot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fake-sky"
        self.folder.mkdir(parents=True)
        self.python = self.folder / "python"
        self.python.write_text(SCRIPT.format(python=sys.executable, folder=str(self.folder)))
        self.python.chmod(0o755)
        self._answers: dict[str, list[dict[str, Any]]] = {
            "version": [{"version": "0.14.1", "server": {}, "consolidated": True}],
            "enabled": [{"clouds": ["aws", "slurm"], "why_not": {}}],
            "controller": [{"consolidated": True, "usd_per_hour": 0.0, "idle_minutes": 0}],
            "queue": [{"jobs": []}],
            "clusters": [{"clusters": []}],
            "costs": [{"clusters": []}],
            "cancel": [{"requests": 0, "jobs": []}],
            "down": [{"down": True}],
            "logs": [{"_text": ""}],
        }
        self._write()

    def says(self, verb: str, *answers: dict[str, Any]) -> None:
        """What is answered from now on, in this order."""
        self._answers = json.loads((self.folder / "answers.json").read_text())
        self._answers[verb] = list(answers)
        self._write()

    def _write(self) -> None:
        (self.folder / "answers.json").write_text(json.dumps(self._answers))

    def asked(self, verb: str | None = None) -> list[Any]:
        """The payloads of a verb, or (verb, payload) of all, in the order of asking."""
        path = self.folder / "asked.jsonl"
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        if verb is None:
            return [(line["verb"], line["payload"]) for line in lines]
        return [line["payload"] for line in lines if line["verb"] == verb]


def error(code: str, message: str, **more: Any) -> dict[str, Any]:
    """An answer that is an error."""
    return {"error": {"code": code, "message": message}, **more}


def job(**given: Any) -> dict[str, Any]:
    """A row of `queue`: a training stage that runs on one rented machine since a minute."""
    row = {
        **{"job_id": 1, "task_id": 0, "name": "tiny-abc123", "task": "tiny-train"},
        **{"status": "RUNNING", "finished": False, "cluster": None, "resources": "1x[A100:8]"},
        **{"machine": "1x(gpus=A100:8, ...)", "cloud": "AWS", "region": "us-east-1"},
        **{"submitted_at": 1e9, "start_at": 1e9 + 60, "end_at": None, "job_duration": 60.0},
        **{"recovered_at": None, "recoveries": 0, "failure": "", "details": ""},
        **given,
    }
    row["cluster"] = row["cluster"] or f"{row['task']}-{row['job_id']}"
    row["finished"] = row["status"] in ("SUCCEEDED", "CANCELLED") or "FAILED" in row["status"]
    return row


def cluster(name: str = "tiny-train-1", **given: Any) -> dict[str, Any]:
    """A row of `clusters`: it is up."""
    return {
        **{"name": name, "status": "UP", "launched_at": 1e9, "resources": "1x(gpus=A100:8, ...)"},
        **{"cloud": "AWS", "region": "us-east-1", "nodes": 1, "usd_per_hour": 20.0},
        **{"autostop": 10, "down": True, "managed": True},
        **given,
    }


def cost(name: str = "tiny-train-1", usd: float = 1.0, **given: Any) -> dict[str, Any]:
    """A row of `costs`: what the meter says of a machine at $20 an hour that is up."""
    seconds = usd / 20.0 * 3600
    return {
        **{"name": name, "status": "UP", "seconds": seconds, "usd": usd, "nodes": 1},
        **{"cloud": "AWS", "region": "us-east-1", "resources": "1x(gpus=A100:8, ...)"},
        **{"intervals": [[1e9, None]], "hash": "h1"},
        **given,
    }
