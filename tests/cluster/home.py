"""A home of SkyPilot's own, and its API server: nothing of the person's ~/.sky is read or written.

    python tests/cluster/home.py start FOLDER --sky PYTHON    write the home, start the server
    python tests/cluster/home.py env   FOLDER --sky PYTHON    the environment: eval "$(...)"
    python tests/cluster/home.py stop  FOLDER --sky PYTHON

FOLDER is the one that `slurm.sh up` was given: the home lies in it. PYTHON is one that has
skypilot[slurm]. `start` prints the environment too. The server's port is 46590, so that it never
meets a person's own at SkyPilot's 46580; `--port` changes it. Server and client read it from the
same variable, so every command in that environment finds this server and no other.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLUSTER = "pretended"  # SkyPilot's `infra: slurm/pretended`
USD_PER_GPU_HOUR = 1.25

SSH = """\
Host {cluster}
    HostName 127.0.0.1
    Port {ssh_port}
    User root
    IdentityFile {key}
    IdentitiesOnly yes
"""

# Only GPU hours cost, so that a test can reckon a bill in its head. The time limit is Slurm's own.
# The controller of jobs lives in the API server: SkyPilot would rent a machine for it otherwise.
CONFIG = """\
jobs:
  controller:
    consolidation_mode: true
slurm:
  provision_timeout: 60
  pricing:
    cpu: 0.0
    memory: 0.0
    accelerators:
      A100: {usd_per_gpu_hour}
  sbatch_options:
    time: "1:00:00"
"""


# To read a task that names an accelerator, SkyPilot fetches its list of them from the internet.
# A list that has no record of a download beside it is left as it is.
ACCELERATORS = """\
AcceleratorName,Clouds
A100,['slurm']
"""


def write_home(folder: Path, *, ssh_port: int, usd_per_gpu_hour: float) -> Path:
    home = folder / "home"
    (home / ".slurm").mkdir(parents=True, exist_ok=True)
    (home / ".sky").mkdir(exist_ok=True)
    key = folder / "ssh" / "key"
    ssh = SSH.format(cluster=CLUSTER, ssh_port=ssh_port, key=key)
    (home / ".slurm" / "config").write_text(ssh, encoding="utf-8")
    config = CONFIG.format(usd_per_gpu_hour=usd_per_gpu_hour)
    (home / ".sky" / "config.yaml").write_text(config, encoding="utf-8")
    catalog = home / ".sky" / "catalogs" / "v8" / "common" / "accelerators.csv"
    catalog.parent.mkdir(parents=True, exist_ok=True)
    catalog.write_text(ACCELERATORS, encoding="utf-8")
    return home


def environment(folder: Path, *, sky: Path, port: int) -> dict[str, str]:
    """What a command needs beside its own environment, to talk to this server or to be it."""
    tools = folder / "tools" / "bin"  # rsync, where this machine has none
    return {
        "HOME": str(folder / "home"),
        "PATH": os.pathsep.join([str(sky.parent), str(tools), os.environ["PATH"]]),
        "PYTHONPATH": str(HERE / "offline"),
        "SKYPILOT_API_SERVER_LOCAL_PORT": str(port),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    }


def home_of_server(port: int) -> str | None:
    """The home of the SkyPilot API server at this port of this machine, none where none runs."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"sky.server.server" in words and f"--port={port}".encode() in words:
                variables = (process / "environ").read_bytes().split(b"\0")
                return next(v[5:].decode() for v in variables if v.startswith(b"HOME="))
        except (OSError, StopIteration):  # it ended, or it is another person's
            continue
    return None


def api(verb: str, *, sky: Path, env: dict[str, str]) -> None:
    owner = home_of_server(int(env["SKYPILOT_API_SERVER_LOCAL_PORT"]))
    if owner not in (None, env["HOME"]):
        sys.exit(f"home.py: that port is of the server with home {owner}: take another --port")
    command = [str(sky.with_name("sky")), "api", verb]
    asked = os.environ | env
    asked.pop("SKYPILOT_API_SERVER_ENDPOINT", None)  # a server elsewhere would be asked instead
    subprocess.run(command, env=asked, check=True, stdout=sys.stderr)


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["start", "env", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sky", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--port", type=int, default=46590)
    parser.add_argument("--ssh-port", type=int, default=2222)
    parser.add_argument("--usd-per-gpu-hour", type=float, default=USD_PER_GPU_HOUR)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    asked = parse(argv)
    folder, sky = asked.folder.resolve(), asked.sky.absolute()
    env = environment(folder, sky=sky, port=asked.port)
    if asked.verb == "stop":
        api("stop", sky=sky, env=env)
        return
    if asked.verb == "start":
        write_home(folder, ssh_port=asked.ssh_port, usd_per_gpu_hour=asked.usd_per_gpu_hour)
        api("start", sky=sky, env=env)
    print("unset SKYPILOT_API_SERVER_ENDPOINT")
    for name, value in env.items():
        print(f"export {name}='{value}'")


if __name__ == "__main__":
    main()
