#!/usr/bin/env bash
# What a rented machine does: makes the environment, runs the stages, and stops them when the money says so.
#
#     node.sh STAGE... --store STORE --name NAME [OPTION...] [-- WORDS]
#
#     setup      the environment: unpacked from the kit, else installed; the other stages make it too where it is missing
#     prepare    tuppence prepare WORDS --data STORE/data
#     train      [torchrun] tuppence train WORDS machine.usd_per_hour=P --runs STORE/runs --data STORE/data --held ...
#     eval       tuppence eval STORE/runs/NAME --tasks TASKS, results sent to the run's place on the store
#
# The kit is the folder that this script lies in, with code.tar.gz (and env-x86_64.tar) beside it; from an unpacked
# checkout it runs that. Nothing is written outside --work, the store and the user's cache folder.
#
#     --store STORE         a bucket (s3://..., gs://...) or a folder that all machines see
#     --name NAME           of the run
#     --work DIR            scratch, environment, code (/tmp/tuppence); one for each user of a shared machine
#     --python PATH         use this interpreter, which has all that is needed: nothing is installed
#     --python-version V    of the environment that is made (3.12)
#     --extras A,B          extras of the package to install (bucket,hub,wandb)
#     --torch BACKEND       which torch to install, in uv's words (cu128, cpu); without it what this machine's driver
#                           takes, and PyPI's where there is no driver
#     --pack                after set-up, send the environment to the kit's place, for the next machine
#     --usd-per-hour P      of one machine; without it looked up in $TUPPENCE_PRICES by what $SKYPILOT_CLUSTER_INFO says
#     --budget-usd X        the run's budget, for the dead-man timer until the trainer knows better
#     --budget-hours H      the same
#     --since WHEN          from when the machine is paid: auto, boot, container, allocation, now, or epoch seconds
#     --tail S              seconds charged in advance, for what comes between the trainer's end and the bill's (0)
#     --limit STAGE=S       prepare or eval may take so many seconds
#     --tasks A,B           of eval (bpb)
#     --gpus N              processes to start; without it all GPUs that are here and ours
#
# Exit code: the stage's own (0 done, 2 wrong input, 3 does not fit, 1 a fault, 4 overtaken, 128+n stopped by a signal after saving);
# 124 where the dead-man timer stopped it; 75 where the stage failed twice and another machine may help.
# Several nodes: $SKYPILOT_NODE_IPS, $SKYPILOT_NODE_RANK. A provider's notice that a spot machine goes away is not asked
# for: the trainer's last checkpoint is seconds old.
set -euo pipefail

RETRY_AFTER=60       # a stage that ran so long before it failed is tried once more
MOST_MOVES=2         # how often a run may ask for another machine because a stage failed
KILL_AFTER=20        # seconds between the dead-man timer's TERM and its KILL
LAST_WORDS=15        # seconds for the bill of a trainer that is gone
SETUP_LIMIT=1800     # seconds that one step of set-up may take: a download can hang
BEFORE_BOOT=20       # clouds start the clock before the kernel starts its own (assumed)
SELF=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
VM_CLOUDS=' aws azure gcp ibm oci lambda nebius cudo do fluidstack hyperbolic paperspace scp seeweb shadeform vsphere '

say() { printf 'node.sh: %s\n' "$*" >&2; }
refuse() { say "$*"; exit 2; }

# ---------------------------------------------------------------------------------------------------------------------
# Words

read_words() {
  STAGES=() STORE='' NAME='' WORDS=() WORK=/tmp/tuppence PYTHON='' PYTHON_VERSION=3.12 EXTRAS='' PACK='' TORCH=''
  PRICE='' BUDGET_USD='' BUDGET_HOURS='' SINCE=auto TAIL=0 LIMITS='' TASKS=bpb GPUS=''
  while [ $# -gt 0 ]; do
    case $1 in
      setup | prepare | train | eval) STAGES+=("$1"); shift; continue ;;
      --pack) PACK=yes; shift; continue ;;
      --) shift; WORDS=("$@"); break ;;
    esac
    case $1 in
      --*) [ $# -gt 1 ] || refuse "$1: an option without its value" ;;
      *) refuse "$1: no such stage; there are setup, prepare, train, eval" ;;
    esac
    case $1 in
      --store) STORE=${2%/} ;;
      --name) NAME=$2 ;;
      --work) WORK=${2%/} ;;
      --python) PYTHON=$2 ;;
      --python-version) PYTHON_VERSION=$2 ;;
      --extras) EXTRAS=$2 ;;
      --torch) TORCH=$2 ;;
      --usd-per-hour) PRICE=$2 ;;
      --budget-usd) BUDGET_USD=$2 ;;
      --budget-hours) BUDGET_HOURS=$2 ;;
      --since) SINCE=$2 ;;
      --tail) TAIL=$2 ;;
      --limit) LIMITS+=" $2" ;;
      --tasks) TASKS=$2 ;;
      --gpus) GPUS=$2 ;;
      *) refuse "$1: no such option" ;;
    esac
    shift 2
  done
  [ ${#STAGES[@]} -gt 0 ] || refuse 'name a stage: setup, prepare, train, eval'
  [ -n "$STORE" ] || refuse 'say where data and runs are: --store'
  [ -n "$NAME" ] || refuse "say the run's name: --name"
  case $STORE in *://* | /*) ;; *) STORE=$PWD/$STORE ;; esac
  case $WORK in /*) ;; *) WORK=$PWD/$WORK ;; esac
  case $PYTHON in '' | /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
  RUN=$WORK/runs/$NAME
  NODES=${SKYPILOT_NUM_NODES:-1} NODE_RANK=${SKYPILOT_NODE_RANK:-0}
}

# ---------------------------------------------------------------------------------------------------------------------
# Code and environment

unpack_code() {
  local here=${SELF%/*} sum
  if [ ! -e "$here/code.tar.gz" ]; then
    KIT='' CODE=$(cd "$here/../.." && pwd)
    return
  fi
  sum=$(sha256sum <"$here/code.tar.gz")
  KIT=$here CODE=$WORK/code/${sum:0:16}
  [ -d "$CODE" ] && return
  mkdir -p "$CODE.$$"
  tar -xzf "$here/code.tar.gz" -C "$CODE.$$"
  mv -T "$CODE.$$" "$CODE" 2>/dev/null || [ -d "$CODE" ] || refuse "$WORK/code cannot be written"
}

# The interpreter with all that the package needs, into PYTHON.
environment() {
  export PYTHONPATH=$CODE
  if [ -z "$PYTHON" ]; then
    mkdir -p "$WORK" 2>/dev/null && [ -w "$WORK" ] || refuse "$WORK is another user's: give --work a folder of your own"
    exec 9>"$WORK/.lock"
    flock 9  # several runs may share a machine
    unpack_environment
    install_environment
    exec 9>&-
  fi
  "$PYTHON" -m tuppence --version >/dev/null || refuse "$PYTHON cannot run the code in $CODE"
  check_environment && return
  [ -n "${ENVIRONMENT:-}" ] && [ "$(gpus)" != 0 ] || exit 2
  say 'installing the torch that this driver takes'  # what was packed is of another machine
  rm -f "$ENVIRONMENT/.key"
  TORCH=auto
  install_environment --reinstall-package=torch
  check_environment || exit 2
}

check_environment() { "$PYTHON" -m tuppence.node check --store "$STORE" --gpus "$(gpus)"; }

# What must be installed for these extras: one number that another list would not have.
wanted_key() {
  local extra lists=("$CODE/requirements/base.txt")
  for extra in ${EXTRAS//,/ }; do
    [ -e "$CODE/requirements/$extra.txt" ] || refuse "--extras $extra: there is no such extra"
    lists+=("$CODE/requirements/$extra.txt")
  done
  REQUIREMENTS=("${lists[@]/#/--requirements=}")
  KEY=$(cat "${lists[@]}" | cksum)
}

unpack_environment() {
  local pack="$KIT/env-$(uname -m).tar" began=$SECONDS
  ENVIRONMENT=$WORK/env
  [ -n "$KIT" ] && [ -e "$pack" ] && [ ! -e "$ENVIRONMENT/.key" ] || return 0
  rm -rf "$ENVIRONMENT" "$ENVIRONMENT.part"
  mkdir -p "$ENVIRONMENT.part"
  tar -xf "$pack" -C "$ENVIRONMENT.part"
  mv "$ENVIRONMENT.part" "$ENVIRONMENT"
  say "environment unpacked in $((SECONDS - began)) s"
}

install_environment() {
  local uv began=$SECONDS
  wanted_key
  if [ -z "$TORCH" ] && [ "$(gpus)" != 0 ]; then TORCH=auto; fi
  if [ "$(cat "$ENVIRONMENT/.key" 2>/dev/null)" != "$KEY" ]; then
    say "installing Python and packages into $ENVIRONMENT"
    uv=$(find_uv)
    export UV_CACHE_DIR=${UV_CACHE_DIR:-$WORK/uv-cache}
    make_python "$uv"
    if [ -n "$TORCH" ] && ! "$uv" pip install --help | grep -q torch-backend; then
      say "$uv is too old to choose torch for $TORCH: PyPI's is installed"
      TORCH=''
    fi
    limited "$uv" pip install --quiet --python "$ENVIRONMENT/$(cat "$ENVIRONMENT/.python")" --break-system-packages \
      --compile-bytecode "${REQUIREMENTS[@]}" ${TORCH:+--torch-backend="$TORCH"} "$@"
    echo "$KEY" >"$ENVIRONMENT/.key"
    say "environment installed in $((SECONDS - began)) s"
  fi
  PYTHON=$ENVIRONMENT/$(cat "$ENVIRONMENT/.python")
}

# A Python of uv's own finds its parts wherever its folder lies, so the whole environment can be moved as it is.
make_python() {
  local found
  [ -e "$ENVIRONMENT/.python" ] && return
  mkdir -p "$ENVIRONMENT"
  if limited "$1" python install --quiet --no-bin --install-dir "$ENVIRONMENT/python" "$PYTHON_VERSION"; then
    found=$(cd "$ENVIRONMENT" && ls -d python/cpython-*.*.*/bin/python3 | head -n 1)
  else
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || refuse \
      "uv could not bring Python $PYTHON_VERSION, and this machine's own is older than 3.11: give --python or an image"
    say "uv could not bring Python $PYTHON_VERSION: using this machine's $(python3 --version)"
    limited "$1" venv --quiet --python "$(command -v python3)" "$ENVIRONMENT/venv"
    found=venv/bin/python
  fi
  echo "$found" >"$ENVIRONMENT/.python"
}

find_uv() {
  local uv
  for uv in uv "$HOME/.local/bin/uv" "$WORK/uv/bin/uv"; do
    if command -v "$uv"; then return; fi
  done
  if python3 -m pip --version >/dev/null 2>&1; then
    limited python3 -m pip install --quiet --target "$WORK/uv" uv >&2
  elif command -v curl >/dev/null; then
    limited curl -LsSf https://astral.sh/uv/install.sh | UV_UNMANAGED_INSTALL=$WORK/uv/bin sh >&2
  else
    refuse 'uv is not here, and neither pip nor curl to bring it: give --python or an image'
  fi
  echo "$WORK/uv/bin/uv"
}

limited() { timeout "$SETUP_LIMIT" "$@"; }

# The next machine unpacks what this one built. A virtual environment leans on this machine's Python and stays here.
pack_environment() {
  local began=$SECONDS name
  [ -n "$PACK" ] && [ -n "$KIT" ] || return 0
  name=env-$(uname -m).tar
  if [ ! -e "${ENVIRONMENT:-}/.key" ] || [ "$(cat "$ENVIRONMENT/.python")" = venv/bin/python ]; then
    say 'the environment is not packed: it leans on this machine'
    return
  fi
  "$PYTHON" -m tuppence.node pack "$ENVIRONMENT" "$STORE/kit/$(cat "$CODE/KIT")" "$name"
  say "environment packed in $((SECONDS - began)) s"
}

# ---------------------------------------------------------------------------------------------------------------------
# Since when the machine is paid

cloud_here() { sed -n 's/.*"cloud": *"\([^"]*\)".*/\L\1/p' <<<"${SKYPILOT_CLUSTER_INFO:-}"; }

paid_since() {
  local how=$SINCE cloud
  if [ "$how" = auto ]; then
    cloud=$(cloud_here)
    if [ -n "${SLURM_JOB_ID:-}" ]; then how=allocation
    elif [ -z "$cloud" ]; then how=now
    elif [[ $VM_CLOUDS == *" $cloud "* ]]; then how=boot
    else how=container
    fi
  fi
  case $how in
    boot) echo $(($(sed -n 's/^btime //p' /proc/stat) - BEFORE_BOOT)) ;;
    container) first_process ;;
    allocation) allocated ;;
    now) date +%s ;;
    *[!0-9.]* | '') refuse "--since $how: auto, boot, container, allocation, now, or seconds since the epoch" ;;
    *) echo "$how" ;;
  esac
}

# When the first process of this container, or of this machine, was started.
first_process() {
  local stat ticks
  stat=$(cat /proc/1/stat)
  ticks=$(awk '{print $20}' <<<"${stat##*) }")
  echo $(($(sed -n 's/^btime //p' /proc/stat) + ticks / $(getconf CLK_TCK)))
}

allocated() {
  local begun
  if [ -n "${SLURM_JOB_START_TIME:-}" ]; then echo "$SLURM_JOB_START_TIME"; return; fi
  begun=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %S 2>/dev/null || true)
  if ! date -d "${begun:-?}" +%s 2>/dev/null; then
    say "Slurm does not say since when job $SLURM_JOB_ID runs: paid since now"
    date +%s
  fi
}

# ---------------------------------------------------------------------------------------------------------------------
# Stages

run_stages() {
  local stage
  mkdir -p "$RUN"
  exec </dev/null
  cd "$CODE"
  for stage in "${STAGES[@]}"; do
    [ "$stage" = setup ] || with_retry "$stage"
  done
}

# A fault after a while is worth one more try, here, where the data is; what fails at once will fail again.
with_retry() {
  local began=$SECONDS code=0 again=''
  attempt "$1" || code=$?
  if may_pass $code && [ $((SECONDS - began)) -ge "$RETRY_AFTER" ] && [ -z "$STOPPED" ]; then
    say "$1 failed after $((SECONDS - began)) s with exit code $code: once more"
    code=0
    attempt "$1" || code=$?
    again=yes
  fi
  [ $code != 0 ] || return 0
  say "$1 ended with exit code $code"
  if [ "$1" = train ] && [ "$NODE_RANK" = 0 ] && [ -z "$STOPPED" ]; then
    timeout "$LAST_WORDS" "$PYTHON" -m tuppence.node charge "$STORE/runs/$NAME" "$RUN" || true  # what the trainer could not: it is gone
  fi
  if [ -n "$again" ] && may_pass $code && another_machine; then code=75; fi
  exit $code
}

# A fault, a stalled rank, or death by a signal that is no order to stop: SIGABRT to SIGSEGV.
may_pass() { [ "$1" = 1 ] || [ "$1" = 75 ] || { [ "$1" -ge 134 ] && [ "$1" -le 139 ]; }; }

# The count lies beside the kit, so that the next machine knows it. Without a kit nobody would bring another machine.
another_machine() {
  [ -n "$KIT" ] || return 1
  "$PYTHON" -m tuppence.node moves "$STORE/kit/$(cat "$CODE/KIT")" "moves-$NAME.json" --most "$MOST_MOVES"
}

attempt() {
  rm -f "$RUN"/{deadline.json,exit,dead_man}
  "stage_$1"
}

stage_prepare() {
  [ "$NODE_RANK" = 0 ] || return 0
  [ "$RUN/prepare" -nt "$RUN/setup" ] || date +%s.%N >"$RUN/prepare"
  if [[ " ${STAGES[*]} " == *' train '* ]]; then hold >/dev/null || return; fi  # the budget bounds it here
  until_limit prepare
  COMMAND=("$PYTHON" -m tuppence prepare "${WORDS[@]}" --data "$STORE/data")
  watched prepare
}

# held.json and the first deadline of what the budget covers; prints the price.
hold() {
  local since began=()
  since=$(paid_since) || return
  # of this machine's own set-up: on a disk that stays, an earlier task's is there too
  [ ! "$RUN/prepare" -nt "$RUN/setup" ] || began=(--prepare "$(cat "$RUN/prepare")")
  "$PYTHON" -m tuppence.node held "$RUN" --since "$since" --setup "$(cat "$RUN/setup")" "${began[@]}" \
    --tail "$TAIL" --nodes "$NODES" ${PRICE:+--usd-per-hour "$PRICE"} ${BUDGET_USD:+--budget-usd "$BUDGET_USD"} \
    ${BUDGET_HOURS:+--budget-hours "$BUDGET_HOURS"}
}

stage_train() {
  local price
  price=$(hold) || return
  ranks train "${WORDS[@]}" "machine.usd_per_hour=$price" --runs "$STORE/runs" --data "$STORE/data" \
    --held "$RUN/held.json"
  watched train
}

stage_eval() {
  [ "$NODE_RANK" = 0 ] || return 0
  until_limit eval
  NODES=1
  ranks eval "$STORE/runs/$NAME" --tasks "$TASKS" --data "$STORE/data"
  watched eval || return
  case $STORE in *://*) "$PYTHON" -m tuppence.node send-evaluations "$STORE/runs/$NAME" ;; esac
}

# A limit of its own, where one was given: the run's budget says nothing of these stages.
until_limit() {
  local limit
  for limit in $LIMITS; do
    [ "${limit%%=*}" = "$1" ] || continue
    printf '{"deadline": %d}\n' $(($(date +%s) + ${limit#*=})) >"$RUN/deadline.json"
  done
}

# How many GPUs are here and ours. Where no driver answers there is none, whatever the scheduler says.
gpus() {
  local here
  here=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  [ -e /proc/driver/nvidia ] || [ -e /dev/dxg ] || [ -e /dev/nvhost-gpu ] || here=0
  if [ "$here" = 0 ]; then echo 0
  elif [ -n "$GPUS" ]; then echo "$GPUS"
  elif [ -n "${SKYPILOT_NUM_GPUS_PER_NODE:-}" ]; then echo "$SKYPILOT_NUM_GPUS_PER_NODE"
  elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then awk -F, '{print NF}' <<<"$CUDA_VISIBLE_DEVICES"
  else echo "$here"
  fi
}

# A rented GPU that no driver answers for is paid for nothing. (Slurm's may be pretended.)
no_gpu_is_right() {
  local cloud
  cloud=$(cloud_here)
  [ "${SKYPILOT_NUM_GPUS_PER_NODE:-0}" = 0 ] && return
  say "$SKYPILOT_NUM_GPUS_PER_NODE GPUs were asked for, and no driver answers: $( (nvidia-smi -L 2>&1 || true) | sed 's/.*: line [0-9]*: //;q')"
  [ "$cloud" != slurm ] || return 0
  if another_machine; then exit 75; fi
  exit 1
}

# COMMAND: the verb as one process, or as one for each GPU of each node. torchrun's own exit code is 1 whatever its
# ranks' is, so that the first rank here leaves its own in a file.
ranks() {
  local each spread
  each=$(gpus)
  if [ "$each" = 0 ]; then no_gpu_is_right; each=1; fi
  COMMAND=("$PYTHON" -m tuppence "$@")
  [ "$each" != 1 ] || [ "$NODES" != 1 ] || return 0
  if [ "$NODES" = 1 ]; then
    spread=(--standalone)
  else
    spread=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "${SKYPILOT_NODE_IPS%%$'\n'*}" --master-port 29400)
  fi
  COMMAND=("$PYTHON" -m torch.distributed.run "${spread[@]}" --nproc-per-node "$each"
    -m tuppence.node rank "$RUN/exit" "$@")
}

# ---------------------------------------------------------------------------------------------------------------------
# A stage under the dead-man timer

# Run COMMAND as a child; its exit code, or 124 where the timer stopped it.
watched() {
  local mark=$NAME.$1.$$ code
  env TUPPENCE_STAGE="$mark" "${COMMAND[@]}" &
  CHILD=$!
  setsid "$BASH" "$SELF" --dead-man "$CHILD" "$mark" "$RUN" "$STORE/runs/$NAME" "$KILL_AFTER" &
  [ -z "$STOPPED" ] || kill -TERM "$CHILD" 2>/dev/null || true
  # a signal ends `wait`, not the child
  while code=0; wait "$CHILD" || code=$?; kill -0 "$CHILD" 2>/dev/null; do :; done
  CHILD=''
  [ ! -e "$RUN/dead_man" ] || return 124
  if [ "$code" = 1 ] && [ -e "$RUN/exit" ]; then code=$(cat "$RUN/exit"); fi
  return "$code"
}

# TERM (a spot notice, a cancel, Slurm's time limit) and Ctrl-C: the trainer saves and exits.
pass_on() {
  STOPPED=yes
  [ -n "$CHILD" ] || { say "$1: nothing was running yet"; exit 143; }
  say "$1: passed on"
  kill -TERM "$CHILD" 2>/dev/null || true
}

# The timer: no Python, in a session of its own, so that neither a hung trainer nor the end of this script stops it.
# The deadline is the earliest that deadline.json ever said: first this script's, then the trainer's own.
dead_man() {
  local child=$1 mark=$2 run=$3 place=$4 kill_after=$5 now said deadline=''
  until belongs "$child" "$mark"; do  # it may not have begun
    kill -0 "$child" 2>/dev/null || return 0
    sleep 0.1
  done
  while belongs "$child" "$mark"; do
    if said=$(deadline_in "$run/deadline.json") && { [ -z "$deadline" ] || [ "$said" -lt "$deadline" ]; }; then
      deadline=$said
    fi
    printf -v now '%(%s)T' -1
    if [ -n "$deadline" ] && [ "$now" -ge "$deadline" ]; then
      put_down "$child" "$mark" "$run" "$place" "$kill_after"
      return
    fi
    sleep 0.5
  done
}

deadline_in() {
  local text
  text=$(cat "$1" 2>/dev/null) || return 1
  [[ $text =~ \"deadline\":\ *([0-9]+) ]] || return 1
  echo "${BASH_REMATCH[1]}"
}

put_down() {
  local child=$1 mark=$2 run=$3 place=$4 kill_after=$5 until pid message
  message='the dead-man timer stopped the process: its money, or its time limit, was spent and it was still there'
  echo "$message" >"$run/dead_man"
  say "$message"
  kill -TERM "$child" 2>/dev/null || true
  until=$((SECONDS + kill_after))
  while [ $SECONDS -lt $until ] && belongs "$child" "$mark"; do sleep 0.2; done
  for pid in $(marked "$mark"); do kill -KILL "$pid" 2>/dev/null || true; done
  case $place in *://*) return ;; esac
  if [ -d "$place" ]; then
    printf '{"time": %s, "code": "dead_man", "message": "%s"}\n' "$(date +%s)" "$message" >>"$place/events.jsonl"
  fi
}

# Whether this number is still the stage's own process: its environment says so.
belongs() { grep -qsxzF "TUPPENCE_STAGE=$2" "/proc/$1/environ"; }

# Every process of the stage, in whatever session: torchrun's ranks have their own.
marked() {
  local file
  grep -lsxzF "TUPPENCE_STAGE=$1" /proc/[0-9]*/environ | while read -r file; do
    file=${file#/proc/}
    echo "${file%%/*}"
  done
}

# ---------------------------------------------------------------------------------------------------------------------

if [ "${1:-}" = --dead-man ]; then
  shift
  dead_man "$@"
  exit
fi
STOPPED='' CHILD=''
read_words "$@"
for tool in setsid flock timeout; do
  command -v $tool >/dev/null || refuse "$tool is not on this machine: the timer that ends a hung trainer needs it (util-linux, coreutils)"
done
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
mkdir -p "$RUN" 2>/dev/null || refuse "$WORK cannot be written: give --work a folder of your own"
if [[ " ${STAGES[*]} " == *' setup '* ]] || [ ! -e "$RUN/setup" ]; then date +%s.%N >"$RUN/setup"; fi
unpack_code
environment
pack_environment
run_stages
