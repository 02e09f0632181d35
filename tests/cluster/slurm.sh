#!/usr/bin/env bash
# A Slurm cluster of one node with eight pretended A100s, for SkyPilot to launch on for real.
#
#   tests/cluster/slurm.sh up     [FOLDER]              build what is missing, start what is down
#   tests/cluster/slurm.sh status [FOLDER]              the node and its jobs; exit 1 if it is down
#   tests/cluster/slurm.sh exec   FOLDER COMMAND...     a command on the node: squeue, scancel 3
#   tests/cluster/slurm.sh down   [FOLDER]              stop it; the next `up` takes a second
#   tests/cluster/slurm.sh wipe   [FOLDER]              `down`, then remove what `up` made in FOLDER
#
# Needs root, apt (Debian or Ubuntu) and its mirror. The first `up` takes a minute or two and about
# 500 MB in FOLDER. Then `tests/cluster/home.py start FOLDER` gives SkyPilot a home that knows it.
#
# The node is a debootstrap chroot of this machine's own release, in mount, process and host name
# spaces of its own. So this machine's mount table never changes, nothing here is killed or mounted
# over by accident, and with the node's first process ends every daemon, job and mount of it: `down`
# has nothing to clean up and can miss nothing. The network is shared: jobs reach what
# this machine reaches, and the ports below must be free.
#
# Jobs run `$PYTHON -m tuppence` of this checkout. Its virtual environment, the interpreter that it
# was made from and the checkout are on the node at the same paths, read-only. $FOLDER/shared is at
# the same path too, writable: it plays the bucket. Whatever a job leaves running dies with the job.
# /var/log/slurm/jobs.log on the node has a line for every allocation that ended.
#
#   FOLDER          where everything lives (CLUSTER_FOLDER, else ~/.cache/tuppence-cluster)
#   PYTHON          the interpreter that jobs use (this checkout's .venv/bin/python)
#   SSH_PORT        2222    sshd, on 127.0.0.1 only
#   SLURMCTLD_PORT  16817
#   SLURMD_PORT     16818
#   GPU             A100    what the node claims to have: GPU_COUNT 8 of them,
#   NODE_CPUS       16      and NODE_MEMORY_MB 24000
#   APT_MIRROR      where the packages come from (the mirror that this machine's apt uses)
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CHECKOUT=$(cd "$HERE/../.." && pwd)
VERB=${1:-}
[ $# -gt 0 ] && shift
if [ $# -gt 0 ]; then
  FOLDER=$1
  shift
fi
FOLDER=$(realpath -m "${FOLDER:-${CLUSTER_FOLDER:-$HOME/.cache/tuppence-cluster}}")
export PYTHON=${PYTHON:-$CHECKOUT/.venv/bin/python}
SSH_PORT=${SSH_PORT:-2222}
SLURMCTLD_PORT=${SLURMCTLD_PORT:-16817}
SLURMD_PORT=${SLURMD_PORT:-16818}
GPU=${GPU:-A100}
GPU_COUNT=${GPU_COUNT:-8}
NODE_CPUS=${NODE_CPUS:-16}
NODE_MEMORY_MB=${NODE_MEMORY_MB:-24000}
NODE=pretended ROOT=$FOLDER/chroot SHARED=$FOLDER/shared

say() { printf 'slurm.sh: %s\n' "$*" >&2; }
refuse() {
  say "$*"
  exit 2
}

# --------------------------------------------------------------------------------------------------
# Building: each step leaves a mark when it is whole, so an interrupted `up` goes on where it was.

once() {  # once NAME COMMAND...
  local mark=$FOLDER/.done-$1
  [ -e "$mark" ] && return
  say "$1 ..."
  "${@:2}"
  touch "$mark"
}

# apt fetches packages from the mirror that it is set up for, and they are unpacked here: nothing is
# installed. SkyPilot's client copies with rsync, which not every machine has.
fetch_tools() {
  local deb tools=$FOLDER/tools
  mkdir -p "$tools"/{debs,root,bin}
  (cd "$tools/debs" && apt-get download -q debootstrap rsync libpopt0 libxxhash0 >&2)
  for deb in "$tools"/debs/*.deb; do dpkg -x "$deb" "$tools/root"; done
  cat >"$tools/bin/rsync" <<X
#!/bin/sh
LD_LIBRARY_PATH=$tools/root/usr/lib/$(uname -m)-linux-gnu exec $tools/root/usr/bin/rsync "\$@"
X
  chmod +x "$tools/bin/rsync"
}

# The release is this machine's own: its interpreter needs its libc on the node too.
bootstrap() {
  local codename mirror tools=$FOLDER/tools/root
  codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
  mirror=${APT_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' \
    'Created-By: Packages' "Codename: $codename" 'Component: main' | sed -n 1p)}
  [ -n "$mirror" ] || refuse "apt knows no mirror of $codename: apt-get update, or set APT_MIRROR"
  # What an interrupted attempt left.
  ! grep -qF " $ROOT/" /proc/self/mounts || refuse "mounted below $ROOT: see /proc/self/mounts"
  rm -rf --one-file-system "$ROOT"
  local packages=slurmd,slurmctld,slurm-client,munge,openssh-server,rsync,python3,python3-venv
  packages+=,curl,ca-certificates,procps,iproute2,git,socat
  # It mounts /proc in the chroot while it works; in a name space of its own nothing of it is left.
  DEBOOTSTRAP_DIR=$tools/usr/share/debootstrap unshare --mount "$tools/usr/sbin/debootstrap" \
    --variant=minbase --components=main,universe --include="$packages" "$codename" "$ROOT" \
    "$mirror" >"$FOLDER/bootstrap.log" || refuse "debootstrap failed: see $FOLDER/bootstrap.log"
}

# SkyPilot installs uv from astral.sh and Python 3.10 on every node. Where that site cannot be
# reached, a curl that answers for that one address with a uv from PyPI, and a uv that takes the
# node's own Python for 3.10, do as well.
put_shims() {
  local curl=$ROOT/usr/bin/curl uv=$ROOT/usr/lib/tuppence-cluster
  rm -rf "$FOLDER/tools/uv"
  mkdir -p "$uv"
  "$PYTHON" -m pip download -q --no-deps --disable-pip-version-check -d "$FOLDER/tools/uv" uv
  "$PYTHON" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' \
    "$FOLDER"/tools/uv/uv-*.whl "$FOLDER/tools/uv"
  install -m 755 "$FOLDER"/tools/uv/uv-*.data/scripts/uv "$uv/uv.real"
  cat >"$uv/uv" <<'X'
#!/bin/bash
args=()
for word in "$@"; do
  [ "$word" = 3.10 ] && word=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  args+=("$word")
done
export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_PYTHON_PREFERENCE=only-system
exec /usr/lib/tuppence-cluster/uv.real "${args[@]}"
X
  [ -e "$curl.real" ] || mv "$curl" "$curl.real"
  cat >"$curl" <<'X'
#!/bin/sh
for word in "$@"; do
  case $word in
    https://astral.sh/uv/install.sh*) exec cat /usr/lib/tuppence-cluster/install.sh ;;
  esac
done
exec /usr/bin/curl.real "$@"
X
  cat >"$uv/install.sh" <<'X'
folder=${UV_INSTALL_DIR:-$HOME/.local/bin}
mkdir -p "$folder" && cp /usr/lib/tuppence-cluster/uv "$folder/uv"
X
  chmod +x "$uv/uv" "$curl"
}

make_keys() {
  mkdir -p "$ROOT/root/.ssh" "$FOLDER/ssh"
  rm -f "$FOLDER/ssh/key" "$FOLDER/ssh/key.pub"
  ssh-keygen -q -t ed25519 -N '' -C tuppence-cluster -f "$FOLDER/ssh/key"
  install -m 600 "$FOLDER/ssh/key.pub" "$ROOT/root/.ssh/authorized_keys"
  dd if=/dev/urandom of="$ROOT/etc/munge/munge.key" bs=1024 count=1 status=none
  chroot "$ROOT" chown -R munge:munge /etc/munge
  chmod 400 "$ROOT/etc/munge/munge.key"
}

# What may differ from one `up` to the next is written at each.
configure() {
  local etc=$ROOT/etc last=$((GPU_COUNT - 1))
  mkdir -p "$SHARED" "$etc/slurm" "$ROOT"/var/spool/slurm/{ctld,d} "$ROOT"/{var/log/slurm,opt/gpus}
  cp /etc/resolv.conf "$etc/resolv.conf"
  cp /etc/ssl/certs/ca-certificates.crt "$etc/ssl/certs/"  # as this machine trusts
  { echo "127.0.0.1 $NODE"; cat /etc/hosts; } >"$etc/hosts"
  echo "$NODE" >"$etc/hostname"
  for i in $(seq 0 "$last"); do : >"$ROOT/opt/gpus/$i"; done
  echo "NodeName=$NODE Name=gpu Type=$GPU File=/opt/gpus/[0-$last]" >"$etc/slurm/gres.conf"
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n' >"$etc/slurm/cgroup.conf"
  cat >"$etc/slurm/slurm.conf" <<X
ClusterName=local
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
StateSaveLocation=/var/spool/slurm/ctld
SlurmdSpoolDir=/var/spool/slurm/d
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
Epilog=/etc/slurm/epilog.sh
JobCompType=jobcomp/filetxt
JobCompLoc=/var/log/slurm/jobs.log
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmctldPort=$SLURMCTLD_PORT
SlurmdPort=$SLURMD_PORT
MpiDefault=none
GresTypes=gpu
NodeName=DEFAULT CPUs=$NODE_CPUS RealMemory=$NODE_MEMORY_MB Gres=gpu:$GPU:$GPU_COUNT
NodeName=$NODE NodeAddr=127.0.0.1 State=UNKNOWN
PartitionName=all Nodes=$NODE Default=YES MaxTime=INFINITE State=UP
X
  # Where cgroups hold a job, nothing outlives it. Here a process that ignores SIGTERM would, and
  # would train on beside its successor. So the node kills what is left of a job, which it knows by
  # its environment.
  cat >"$etc/slurm/epilog.sh" <<'X'
#!/bin/bash
for environ in /proc/[0-9]*/environ; do
  pid=${environ#/proc/}
  pid=${pid%/environ}
  tr '\0' '\n' <"$environ" | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID" || continue
  [ "$pid" = $$ ] || kill -KILL "$pid"
done 2>/dev/null
exit 0
X
  chmod +x "$etc/slurm/epilog.sh"
  cat >"$etc/ssh/sshd_cluster" <<X
Port $SSH_PORT
ListenAddress 127.0.0.1
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile /run/sshd.pid
Subsystem sftp internal-sftp
AcceptEnv *
X
}

# --------------------------------------------------------------------------------------------------
# Running

# The folders that jobs read: the checkout, the virtual environment, the interpreter that it was
# made from. What is in the system's own /usr is on the node already.
visible_folders() {
  "$PYTHON" - "$CHECKOUT" <<'X'
import pathlib, sys
folders = {pathlib.Path(p).resolve() for p in (sys.argv[1], sys.prefix, sys.base_prefix)}
for folder in sorted(folders):
    if folder != pathlib.Path("/usr") and not any(other in folder.parents for other in folders):
        print(folder)
X
}

# The node's first process: it mounts, starts the daemons, and reaps. With it ends all below it.
first_process() {
  local folder pid
  # This machine's /proc is still mounted here, and knows this process by its number out there.
  read -r pid _ </proc/self/stat && echo "$pid" >"$FOLDER/init.pid.new"
  mount --make-rprivate /
  mount --rbind /dev "$ROOT/dev"
  mount --rbind /sys "$ROOT/sys"
  mount -t proc proc "$ROOT/proc"
  mount -t tmpfs tmpfs "$ROOT/run"
  mkdir -p "$ROOT/run/sshd" "$ROOT/run/munge" "$ROOT$SHARED"
  chroot "$ROOT" chown -R munge:munge /run/munge /var/lib/munge /var/log/munge
  visible_folders | while read -r folder; do
    mkdir -p "$ROOT$folder"
    mount --bind "$folder" "$ROOT$folder"
    mount -o remount,bind,ro "$ROOT$folder"
  done
  mount --bind "$SHARED" "$ROOT$SHARED"  # last: it may lie inside the checkout
  hostname "$NODE"
  chroot --userspec=munge:munge "$ROOT" /usr/sbin/munged
  chroot "$ROOT" /usr/sbin/slurmctld -c  # no job of an earlier node lives: its state is forgotten
  chroot "$ROOT" /usr/sbin/slurmd
  chroot "$ROOT" /usr/sbin/sshd -f /etc/ssh/sshd_cluster
  mv "$FOLDER/init.pid.new" "$FOLDER/init.pid"
  # A shell that waits reaps every orphan.
  exec chroot "$ROOT" /bin/bash -c 'while :; do sleep 3600; done'
}

# The first process's number, and nothing where that number is dead or was given to another since.
node_pid() {
  local pid
  pid=$(cat "$FOLDER/init.pid" 2>/dev/null) || return 1
  [ "$(readlink "/proc/$pid/root" 2>/dev/null)" = "$ROOT" ] && echo "$pid"
}

on_node() {
  local pid
  pid=$(node_pid) || refuse "no cluster runs in $FOLDER: tests/cluster/slurm.sh up $FOLDER"
  nsenter --target "$pid" --mount --uts --pid --root env -i -C /root HOME=/root TERM=dumb \
    LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

node_is_ready() {
  on_node sinfo --noheader --format=%T 2>/dev/null | grep -E '^(idle|mixed|allocated)$' >/dev/null \
    && (exec 3<>"/dev/tcp/127.0.0.1/$SSH_PORT") 2>/dev/null
}

wait_until() {  # wait_until SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  until "${@:2}"; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.2
  done
}

started_or_dead() {
  node_pid >/dev/null || ! kill -0 "$1" 2>/dev/null
}

need_free_port() {
  ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null \
    || refuse "port $1 is taken on 127.0.0.1: set $2 to a free one"
}

start() {
  node_pid >/dev/null && return
  need_free_port "$SSH_PORT" SSH_PORT
  need_free_port "$SLURMCTLD_PORT" SLURMCTLD_PORT
  need_free_port "$SLURMD_PORT" SLURMD_PORT
  configure
  rm -f "$FOLDER/init.pid"
  setsid unshare --mount --pid --uts --fork \
    "${BASH_SOURCE[0]}" first-process "$FOLDER" </dev/null >"$FOLDER/node.log" 2>&1 &
  wait_until 60 started_or_dead $!
  node_pid >/dev/null || refuse "the node did not start: see $FOLDER/node.log"
}

up() {
  [ "$(id -u)" = 0 ] || refuse 'needs root: it makes a chroot and mounts'
  [ -x "$PYTHON" ] || refuse "no interpreter at $PYTHON: run \`make test\` once, or set PYTHON"
  command -v apt-get >/dev/null || refuse 'needs apt: the node is made of Debian or Ubuntu packages'
  mkdir -p "$FOLDER"
  once tools fetch_tools
  once bootstrap bootstrap
  once shims put_shims
  once keys make_keys
  start
  wait_until 60 node_is_ready \
    || refuse "the node is not ready: see $FOLDER/node.log and $ROOT/var/log/slurm"
  say "up: ssh -p $SSH_PORT -i $FOLDER/ssh/key root@127.0.0.1, shared folder $SHARED"
}

status() {
  if ! node_pid >/dev/null; then say "down ($FOLDER)"; exit 1; fi
  on_node sinfo --Node --format='%N %T %G %c CPUs %m MB'
  on_node squeue
}

down() {
  local pid
  if pid=$(node_pid); then
    # So that Slurm's own books say cancelled, not lost.
    on_node timeout 20 scancel --quiet --user=root || true
    kill -KILL "$pid"
    wait_until 30 eval "! kill -0 $pid 2>/dev/null" || refuse "process $pid does not die"
  fi
  rm -f "$FOLDER/init.pid"
  say "down ($FOLDER)"
}

# The node's mounts died with it. One that is seen from here is another's: then nothing is removed.
wipe() {
  down
  ! grep -qF " $FOLDER/" /proc/self/mounts || refuse "mounted below $FOLDER: see /proc/self/mounts"
  rm -rf --one-file-system "$ROOT" "$FOLDER/tools" "$FOLDER/ssh" "$SHARED"
  rm -f "$FOLDER"/.done-* "$FOLDER"/{node,bootstrap}.log
}

case $VERB in
  up | status | down | wipe) "$VERB" ;;
  exec) on_node "$@" ;;
  first-process) first_process ;;
  *) refuse 'usage: slurm.sh up|status|down|wipe [FOLDER], slurm.sh exec FOLDER COMMAND...' ;;
esac
