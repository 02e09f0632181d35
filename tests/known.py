"""What is known of this machine before a test begins, so that no run has to measure it first."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tuppence import config, host, recipes
from tuppence.config import DataPlan
from tuppence.plan import hardware
from tuppence.plan.hardware import Calibration, Timing
from tuppence.plan.solve import solve


def know_this_machine(
    calibration: Calibration,
    data: DataPlan,
    runs: Iterable[Sequence[str]],
    *,
    ranks: Sequence[int] = (1,),
) -> None:
    """Keep a calibration of this machine, in the cache folder that is set, in which the steps of
    these runs were timed: words for the recipe shakespeare, which may be on so many ranks."""
    asked = [config.override(recipes.get("shakespeare"), [*words]) for words in runs]
    for threads in {1, host.usable_cores()}:
        known = replace(calibration, name=host.cpu_name(), threads=threads)
        for run in asked:
            how = str(run.train.attention or "sdpa")
            for world in ranks:
                plan = solve(run, data, known, ranks=world)
                micro, workers = plan.step.micro_batch, plan.step.workers
                timing = Timing("fp32", how, False, micro, workers, 8e-3, 3e-3, 2e-3, "of a test")
                key = hardware.shape_key(plan.model, micro, workers)
                known = known.with_timings(key, [timing])
        hardware.save_calibration(known)
