"""What tuppence asks of SkyPilot, run by a Python that has SkyPilot: `python sky_driver.py VERB`.

    JSON on stdin ──▶ VERB ──▶ one JSON document on stdout, {"error": {"code", "message"}} included
                          └──▶ SkyPilot's own chatter, on stderr

It stands alone and imports nothing of tuppence: SkyPilot brings 130 packages of its own, so it has
an environment of its own. `logs` is the exception: it writes the job's text to stdout.

Written for SkyPilot 0.14.1. Names of its that begin with an underscore, and what comments call
a habit of the library, are what to look at when the version changes. Parts: sky_catalog.py (clouds,
prices, tasks), sky_errors.py.
"""

import collections
import contextlib
import json
import os
import signal
import sys
import traceback

sys.dont_write_bytecode = True  # the package's folder stays as it was installed

from sky_catalog import chain, controller, enabled, quote, version  # noqa: E402
from sky_errors import ANSI, MESSAGE_CHARS, code_of, message_of  # noqa: E402

os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
os.environ.setdefault("SKYPILOT_DISABLE_SPINNER", "1")

COST_DAYS = 400  # habit: clusters that ended longer ago are not in the report
CONTROLLER = "sky-jobs-controller-"  # habit: so the machine is named that watches managed jobs
FINISHED_REQUESTS = ("SUCCEEDED", "FAILED", "CANCELLED")
FIELDS = (  # of a job's queue row; without task YAMLs, which may hold what nobody should see
    *("job_id", "task_id", "job_name", "task_name", "status", "schedule_state", "submitted_at"),
    *("start_at", "end_at", "last_recovered_at", "job_duration", "recovery_count", "resources"),
    *("cluster_resources", "cloud", "region", "zone", "infra", "failure_reason", "details"),
    *("current_cluster_name", "accelerators"),
)


# ---------------------------------------------------------------- asked and answered


def main():
    """Answer one question; exit code 1 where the answer is an error."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    out = _own_stdout()
    if verb not in VERBS:
        return _answer(out, {"error": {"code": "unknown_verb", "message": f"no verb {verb!r}"}})
    asked = json.loads(sys.stdin.read() or "{}")
    try:
        found = VERBS[verb](asked, out) if verb == "logs" else VERBS[verb](asked)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("SKYPILOT_DEBUG"):
            traceback.print_exc()
        found = {"error": {"code": code_of(error), "message": message_of(error)}}
        if verb == "logs":  # stdout is the job's
            sys.stderr.write(json.dumps(found) + "\n")
            return 1
    return 0 if verb == "logs" else _answer(out, found)


def _own_stdout():
    """A handle that only this file writes: whatever else prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


def _answer(out, found):
    out.write(json.dumps(found, allow_nan=False, default=str) + "\n")
    out.flush()
    return 1 if isinstance(found, dict) and "error" in found else 0


# ---------------------------------------------------------------- what runs


def launch(asked):
    """Hand a chain of tasks to SkyPilot's managed jobs; what it says goes to stderr."""
    from sky import jobs
    from sky.client import sdk

    request = jobs.launch(chain(asked), name=asked["name"], job_group=None)
    try:
        ids, _ = sdk.stream_and_get(request, output_stream=sys.stderr)
    except KeyboardInterrupt:  # else it would go on in the server
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sdk.get(sdk.api_cancel(request, silent=True))
        raise
    return {"job_id": ids[0] if ids else None, "job_ids": list(ids or ())}


def queue(asked):
    """Every task of one job, or of the jobs of this name, finished ones too."""
    return {"jobs": _queue(asked)}


def _queue(asked):
    from sky import exceptions, jobs
    from sky.client import sdk

    ids = [asked["job_id"]] if asked.get("job_id") is not None else None
    wanted = {"job_ids": ids, "name_match": asked.get("name"), "fields": FIELDS}
    try:
        found, *_ = sdk.get(jobs.queue_v2(refresh=False, all_users=True, **wanted))
    except exceptions.ClusterNotUpError as error:
        if getattr(error.cluster_status, "value", None) not in (None, "STOPPED"):
            raise
        return []  # no controller's machine, or one that stopped since it had nothing to watch
    rows = [_row(each) for each in found]
    # habit: the server's match is by part of the name
    return [row for row in rows if asked.get("name") in (None, row["name"])]


def _row(record):
    from sky.jobs import utils

    task = record.task_name or record.job_name
    reason = record.failure_reason or ""
    return {
        "job_id": record.job_id,
        "task_id": record.task_id,
        "name": record.job_name,
        "task": task,
        "status": record.status.value if record.status else "PENDING",
        "finished": bool(record.status and record.status.is_terminal()),
        "cluster": record.current_cluster_name
        or utils.generate_managed_job_cluster_name(task, record.job_id),
        "resources": record.resources,
        "machine": _given(record.cluster_resources),
        "cloud": _given(record.cloud),
        "region": _given(record.region),
        "submitted_at": record.submitted_at,
        "start_at": record.start_at,
        "end_at": record.end_at,
        "recovered_at": record.last_recovered_at if (record.last_recovered_at or 0) > 0 else None,
        "job_duration": record.job_duration,
        "recoveries": record.recovery_count or 0,
        "failure": " ".join(ANSI.sub("", reason).split())[:MESSAGE_CHARS],
        "details": " ".join(ANSI.sub("", record.details or "").split())[:MESSAGE_CHARS],
    }


def _given(text):
    return None if text in (None, "", "-") else text


def clusters(asked):
    """Machines that SkyPilot knows of now, those of managed jobs too; `refresh` asks the clouds."""
    from sky.client import sdk
    from sky.utils import common

    mode = common.StatusRefreshMode
    # habit: those of managed jobs are told of to this variable only; it travels with the request
    with _environment("SKYPILOT_DEBUG", "1"):
        request = sdk.status(refresh=mode.FORCE if asked.get("refresh") else mode.NONE)
    return {"clusters": [_cluster(each) for each in sdk.get(request)]}


@contextlib.contextmanager
def _environment(name, value):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _cluster(record):
    resources = getattr(record.handle, "launched_resources", None)
    price = None
    if resources is not None:
        with contextlib.suppress(Exception):  # a machine that the catalog has lost
            price = resources.get_cost(3600) * record.nodes
    return {
        "name": record.name,
        "status": record.status.value,
        "launched_at": record.launched_at,
        "resources": record.resources_str,
        "cloud": record.cloud,
        "region": record.region,
        "nodes": record.nodes,
        "usd_per_hour": price,
        "autostop": record.autostop if record.autostop >= 0 else None,
        "down": record.to_down,
        "managed": record.is_managed,
    }


def costs(asked):
    """SkyPilot's own meter: a row for each cluster that ever was, of the names asked for."""
    from sky.client import sdk

    names = asked.get("names")
    found = sdk.get(sdk.cost_report(days=COST_DAYS))
    return {"clusters": [_cost(row) for row in found if names is None or row["name"] in names]}


def _cost(row):
    intervals = row.get("usage_intervals") or []
    return {
        "name": row["name"],
        "status": getattr(row["status"], "value", row["status"]),
        "seconds": row["duration"],
        "usd": row["total_cost"],
        "nodes": row["num_nodes"],
        "cloud": row.get("cloud"),
        "region": row.get("region"),
        "resources": row.get("resources_str"),
        "intervals": [list(each) for each in intervals],
        "hash": row.get("cluster_hash"),
    }


def look(asked):
    """What a guard wants to know, in one question: jobs of these names, their clusters, and the
    controller's; what they have cost."""
    rows = [row for name in asked["names"] for row in _queue({"name": name})]
    mine = {row["cluster"] for row in rows}
    held = clusters(asked)["clusters"]
    return {
        "jobs": rows,
        "clusters": [each for each in held if each["name"] in mine],
        "controllers": [each for each in held if each["name"].startswith(CONTROLLER)],
        "costs": costs({"names": sorted(mine)})["clusters"] if mine else [],
    }


# ---------------------------------------------------------------- stopped


def cancel(asked):
    """Cancel what has this name: launches that are on their way, and jobs that have not ended.

    A launch is a request that goes on in SkyPilot's server when the one who asked is gone.
    """
    from sky import jobs
    from sky.client import sdk

    requests = [each.request_id for each in sdk.api_status() if _launches(each, asked["name"])]
    if requests:
        sdk.get(sdk.api_cancel(requests, silent=True))
    rows = _queue({"name": asked["name"]})
    ids = sorted({row["job_id"] for row in rows if not row["finished"]})
    if ids:
        sdk.get(jobs.cancel(job_ids=ids))
    return {"requests": len(requests), "jobs": ids}


def _launches(request, name):
    """Whether this is the launch of a job of that name, and still going on."""
    if request.status in FINISHED_REQUESTS or not request.name.endswith("jobs.launch"):
        return False
    try:
        return json.loads(request.request_body).get("name") == name
    except (ValueError, AttributeError):
        return False


def down(asked):
    """Take a cluster down; one that is gone already is no error."""
    from sky import exceptions
    from sky.client import sdk

    try:
        sdk.stream_and_get(sdk.down(asked["cluster"]), output_stream=sys.stderr)
    except exceptions.ClusterDoesNotExist:
        return {"down": False}
    return {"down": True}


def logs(asked, out):
    """A job's text, or of one of its tasks, as it comes; 0 where the job has ended well.

    `ended`: a task that is over, of a job that is not. Habit: SkyPilot shows its log only once the
    whole job is over, and waits for that; so it is read where SkyPilot keeps it.
    """
    from sky import jobs

    if asked.get("ended"):
        return _kept_log(asked, out)
    code = jobs.tail_logs(
        job_id=asked["job_id"],
        task=asked.get("task"),
        follow=bool(asked.get("follow")),
        tail=asked.get("tail"),
        output_stream=out,
    )
    out.flush()
    return {"code": code}


def _kept_log(asked, out):
    from sky.jobs import state

    rows = state.get_all_task_ids_names_statuses_logs(asked["job_id"])
    path = next((row[3] for row in rows if row[0] == asked["task"] and row[3]), None)
    if path is None:  # it is on the server's machine, or the controller's
        raise ValueError(
            "of a stage that is over SkyPilot shows the log once the whole job is over"
        )
    with open(os.path.expanduser(path), encoding="utf-8", errors="replace") as lines:
        out.writelines(collections.deque(lines, asked.get("tail")))
    out.flush()
    return {"code": 0}


VERBS = {
    **{"version": version, "enabled": enabled, "quote": quote, "controller": controller},
    **{"launch": launch, "queue": queue, "clusters": clusters, "costs": costs, "look": look},
    **{"cancel": cancel, "down": down, "logs": logs},
}

if __name__ == "__main__":
    sys.exit(main())
