"""env.json: what a run ran on."""

import platform
import subprocess
from pathlib import Path

from tuppence import host
from tuppence.folder import RunFolder


def record(folder: RunFolder, attempt: int, data_folder: Path, settings: dict[str, str]) -> None:
    """env.json: what the run ran on; the newest attempt's, with the earlier ones below."""
    import numpy
    import safetensors
    import torch

    before = folder.read_json("env.json")
    folder.write_json(
        "env.json",
        {
            "attempt": attempt,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": numpy.__version__,
                "safetensors": safetensors.__version__,
            },
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": host.cpu_name(),
            "usable_cores": host.usable_cores(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "thread_settings": settings,
            "process_start": host.process_start(),
            "code_sha256": host.code_sha256(),
            "git": git_commit(),
            "data_folder": str(data_folder.resolve()),
            "earlier_attempts": [] if before is None else [*before.pop("earlier_attempts"), before],
        },
    )


def git_commit() -> str | None:
    """The commit of the source, where it runs from a checkout and git is there."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
