#!/usr/bin/env bash
# A run on a machine that a person has: the far side of the ssh connection.
#
#   ssh.sh probe FOLDER [PYTHON]       what is here
#   ssh.sh start FOLDER JOB HOW        begin FOLDER/job.sh so that it outlives the connection
#   ssh.sh job FOLDER JOB HOW NAME MAKER PYTHON EXTRAS WORDS    the job: node.sh WORDS
#   ssh.sh status FOLDER JOB NAME      where it stands
#   ssh.sh log FOLDER                  the log
#   ssh.sh follow FOLDER JOB FROM      the log from that byte on, until the job has ended
#   ssh.sh stop FOLDER JOB SECONDS     TERM, and after so many seconds KILL
#   ssh.sh files FOLDER NAME           names and sizes of the run folder's files
#   ssh.sh sums FOLDER NAME FILES      their sha256
#   ssh.sh take FOLDER NAME FILES      them, as a tar
#   ssh.sh clean FOLDER                remove all that is ours
#
# Answers are lines of `tuppence:KEY=VALUE`, and what comes after `tuppence:stream=` is the log or a
# tar: what a login shell says before that does no harm.
#
#   FOLDER/kit/  job.sh  log.txt       the code, what was started, what it said
#   FOLDER/job  ended                  "JOB SINCE PID HOW", and "JOB CODE WHEN" once it is over
#   FOLDER/runs/NAME  data/            as --runs and --data name their folders
#   FOLDER/../.tuppence/               environments and caches, shared by the runs beside it
#
# Every process of a job carries TUPPENCE_JOB=JOB in its environment, so that all of them are found
# again, whatever session or process group they went to.
set -euo pipefail

WAIT_SECONDS=60 # that a job may take to say that it has begun
PASSED='PATH HOME LANG LD_LIBRARY_PATH CUDA_VISIBLE_DEVICES SSL_CERT_FILE
    HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy'

tell() { printf 'tuppence:%s=%s\n' "$1" "$2"; }

members() { # the processes of a job, less this script
    local path
    grep -lsz "^TUPPENCE_JOB=$1\$" /proc/[0-9]*/environ 2>/dev/null | while read -r path; do
        path=${path#/proc/} && printf '%s ' "${path%/environ}"
    done || true
}

alive() { # whether PID is there and is of JOB: its number may be another's by now
    [ -n "${1:-}" ] && grep -qsz "^TUPPENCE_JOB=$2\$" "/proc/$1/environ"
}

# ---------------------------------------------------------------- what is here

recent_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

no_venv() { "$1" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; } # none can stand on it

has() { # PYTHON MODULES: whether it finds them all, without importing any
    local python=$1 && shift
    "$python" -c 'import importlib.util as u, sys
sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' "$@" >/dev/null 2>&1
}

tell_maker() { # what Python the job gets: the given one, one beside the torch that is here, or node.sh's
    local given=$1 each=given python=""
    if [ -n "$given" ]; then
        if ! recent_python "$given"; then
            each=old
        elif ! has "$given" torch numpy safetensors tokenizers tiktoken pyarrow; then
            each=lacking
        fi
        tell maker "$each $given"
        return
    fi
    for each in python3 python3.13 python3.12 python3.11; do
        each=$(command -v "$each" || true)
        [ -n "$each" ] && recent_python "$each" && has "$each" pip && python=$each && break
    done
    if [ -n "$python" ] && has "$python" torch venv ensurepip && no_venv "$python"; then
        tell maker "torch $python"
    elif command -v uv || [ -x "$HOME/.local/bin/uv" ] || [ -n "$python" ] || command -v curl; then
        tell maker "node uv"
    else
        tell maker "none -"
    fi
}

tell_stays() { # what keeps a job alive when the connection goes
    export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}
    local linger
    linger=$(loginctl show-user "$(id -un)" -p Linger --value 2>/dev/null || true)
    if [ -d /run/systemd/system ] && [ "$(id -u)" = 0 ] && systemctl show-environment >/dev/null 2>&1; then
        tell stays systemd-system
    elif [ "$linger" = yes ] && systemctl --user show-environment >/dev/null 2>&1; then
        tell stays systemd-user
    elif busctl get-property org.freedesktop.login1 /org/freedesktop/login1 \
        org.freedesktop.login1.Manager KillUserProcesses 2>/dev/null | grep -q true; then
        tell stays killed # at log-out, whatever it is wrapped in
    elif command -v tmux >/dev/null; then
        tell stays tmux
    elif command -v setsid >/dev/null; then
        tell stays setsid
    else
        tell stays none
    fi
}

probe() {
    local folder=$1 there
    case $folder in /*) ;; *) folder=$HOME/$folder ;; esac
    there=$folder
    while [ ! -d "$there" ]; do there=$(dirname "$there"); done
    tell system "$(uname -s)"
    tell folder "$folder"
    tell user "$(id -un)"
    tell writable "$([ -w "$there" ] && echo yes || echo no)"
    tell free_kib "$(df -Pk "$there" | awk 'END { print $4 }')"
    [ ! -d "$(dirname "$folder")/.tuppence" ] || tell work yes
    tell gpus "$(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU [0-9]*: \(.*\) (UUID.*/\1/p' |
        paste -sd, - || true)"
    tell_maker "${2:-}"
    tell_stays
    if [ -e "$folder" ] && [ ! -e "$folder/kit" ] && [ -n "$(ls -A "$folder")" ]; then
        tell foreign yes # a folder of something else
    fi
    [ ! -f "$folder/words" ] || tell words "$(cat "$folder/words")"
    [ ! -f "$folder/job" ] || status "$folder" "$(cut -d' ' -f1 "$folder/job")"
}

# ---------------------------------------------------------------- the job

start() {
    local folder=$1 job=$2 how=$3 deadline=$((SECONDS + WAIT_SECONDS)) manager=--user each kept=()
    cd "$folder"
    case $how in
    systemd-*)
        [ "$how" = systemd-user ] || manager=--system
        export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}
        for each in $PASSED; do # a unit does not see this session's
            [ -z "${!each:-}" ] || kept+=("--setenv=$each=${!each}")
        done
        systemd-run "$manager" --quiet --collect --unit="tuppence-$job" \
            -p KillMode=mixed -p TimeoutStopSec=120 "${kept[@]}" \
            bash -c 'cd "$0" && exec bash job.sh >>log.txt 2>&1' "$folder"
        ;;
    tmux) tmux -L tuppence -f /dev/null new-session -d -s "$job" \
        bash "$folder/kit/tuppence/assets/ssh.sh" pane "$folder" ;;
    setsid) setsid nohup bash job.sh >>log.txt 2>&1 </dev/null & ;;
    *) echo "no such way: $how" >&2 && return 2 ;;
    esac
    until [ "$(cut -d' ' -f1 job 2>/dev/null)" = "$job" ]; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            tell begun no
            return
        fi
        sleep 0.1
    done
    tell begun yes
}

pane() { # what `tmux -L tuppence attach` shows; to leave it, Ctrl-B and then D
    cd "$1"
    bash job.sh >>log.txt 2>&1 </dev/null &
    tail -n +1 -F --pid=$! log.txt
}

environment() { # ENV PYTHON LISTS: with the torch that PYTHON has; once, however many jobs begin
    local env=$1 python=$2
    shift 2
    mkdir -p "$(dirname "$env")"
    exec 8>"$env.lock"
    flock 8
    [ ! -e "$env/complete" ] || return 0
    echo "making $env with the torch of $python"
    rm -rf "$env"
    "$python" -m venv --system-site-packages "$env"
    "$env/bin/python" -m pip install -q --no-cache-dir --disable-pip-version-check "${@/#/--requirement=}"
    touch "$env/complete"
}

child=""
stopping=""

run() { # a command that TERM reaches while bash waits for it
    local code=0
    [ -z "$stopping" ] || return 143
    "$@" 9>&- </dev/null &
    child=$!
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || return "$code"
    done
}

job() { # FOLDER JOB HOW NAME MAKER PYTHON EXTRAS WORDS
    local folder=$1 job=$2 how=$3 name=$4 maker=$5 python=$6 extras=$7
    local code=0 work env own lists each
    shift 7
    cd "$folder"
    work=$(dirname "$folder")/.tuppence
    exec 9>lock
    flock -n 9 || { echo "another job works in $folder" && return 75; }
    trap '' HUP # a terminal that closes is not the end
    trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
    rm -f ended
    rm -rf "$work/runs/$name" # what node.sh noted of an earlier job
    printf '%s %s %s %s\n' "$job" "$(date +%s)" $$ "$how" >job.part
    mv job.part job
    if [ -f secrets ]; then # from here on they live in the processes alone
        set -a
        . ./secrets
        set +a
        rm -f secrets
    fi
    export XDG_CACHE_HOME=$work/cache PYTHONUNBUFFERED=1
    if [ "$maker" = torch ]; then
        lists=(kit/requirements/base.txt)
        for each in ${extras//,/ }; do lists+=("kit/requirements/$each.txt"); done
        env=$work/env-$(cat "${lists[@]}" | cksum | cut -d' ' -f1)
        run bash kit/tuppence/assets/ssh.sh environment "$env" "$python" "${lists[@]}" || code=$?
        python=$env/bin/python
    fi
    [ "$maker" = node ] && own=(--extras "$extras") || own=(--python "$python")
    [ "$code" != 0 ] || run bash kit/tuppence/assets/node.sh --work "$work" "${own[@]}" "$@" || code=$?
    printf '%s %s %s\n' "$job" "$code" "$(date +%s)" >ended.part
    mv ended.part ended
    return "$code"
}

# ---------------------------------------------------------------- looked at, and ended

status() {
    local folder=$1 job=$2 name=${3:-} begun="" since="" pid="" how="" code="" when="" run file
    [ -d "$folder" ] || { tell there no && return; }
    tell there yes
    [ ! -f "$folder/job" ] || read -r begun since pid how <"$folder/job"
    tell job "$begun"
    tell running "$(members "${job:-$begun}" | wc -w)"
    if [ "$begun" = "${job:-$begun}" ]; then
        tell since "$since"
        tell how "$how"
        [ ! -f "$folder/ended" ] || read -r begun code when <"$folder/ended"
        [ -z "$code" ] || [ "$begun" != "${job:-$begun}" ] || tell ended "$code $when"
    fi
    tell now "$(date +%s)"
    [ ! -f "$folder/log.txt" ] || tell log_bytes "$(wc -c <"$folder/log.txt")"
    [ ! -f "$folder/log.txt" ] || tell last "$(tail -c 4000 "$folder/log.txt" | tr '\r' '\n' |
        awk '/^node.sh: .* ended with exit code/ { next } NF { last = $0 } END { print last }')"
    [ -n "$name" ] || return 0
    run=$folder/runs/$name
    for file in heartbeat.json metrics.jsonl; do
        [ ! -f "$run/$file" ] || tell "${file%.*}" "$(tail -n 1 "$run/$file")"
    done
    [ ! -f "$run/ledger.jsonl" ] || tell ledger_usd "$(grep -o '"usd": *[0-9.eE+-]*' "$run/ledger.jsonl" |
        awk '{ s += $2 } END { printf "%.6f", s }')"
}

follow() {
    local folder=$1 job=$2 from=$3 begun="" since="" pid=""
    tell stream ""
    [ -f "$folder/log.txt" ] || return 0
    [ ! -f "$folder/job" ] || read -r begun since pid _ <"$folder/job"
    if [ "$begun" = "$job" ] && alive "$pid" "$job"; then
        tail -c "+$((from + 1))" -f --pid="$pid" "$folder/log.txt"
    else
        tail -c "+$((from + 1))" "$folder/log.txt"
    fi
}

log() {
    tell stream ""
    [ ! -f "$1/log.txt" ] || cat "$1/log.txt"
}

stop() {
    local folder=$1 job=$2 seconds=$3 begun="" pid="" how="" rest until
    [ ! -f "$folder/job" ] || read -r begun _ pid how <"$folder/job"
    until=$((SECONDS + seconds))
    if [ "$begun" = "$job" ] && alive "$pid" "$job"; then
        kill -TERM "$pid" || true # it tells its child, which saves
        while alive "$pid" "$job" && [ "$SECONDS" -lt "$until" ]; do sleep 0.2; done
    fi
    for _ in 1 2 3 4 5 6 7 8 9 10; do # what is left, also of a half-started job
        rest=$(members "$job")
        [ -n "$rest" ] || break
        kill -KILL $rest 2>/dev/null || true
        sleep 0.2
    done
    case $how in
    tmux) tmux -L tuppence kill-session -t "=$job" 2>/dev/null || true ;;
    esac
    rm -f "$folder/secrets"
    if [ "$begun" = "$job" ] && [ ! -f "$folder/ended" ]; then
        printf '%s 137 %s\n' "$job" "$(date +%s)" >"$folder/ended"
    fi
    status "$folder" "$job"
}

files() {
    local folder=$1 name=$2
    cd "$folder/runs/$name" 2>/dev/null || return 0
    find . -type f -printf 'tuppence:file=%s %P\n'
}

sums() {
    cd "$1/runs/$2"
    shift 2
    sha256sum -- "$@" | sed 's/^/tuppence:sum=/'
}

take() {
    cd "$1/runs/$2"
    shift 2
    tell stream ""
    printf '%s\0' "$@" | tar --null -cf - -T -
}

clean() {
    local folder=$1 parent each
    parent=$(dirname "$folder")
    [ -d "$folder" ] || return 0
    [ -e "$folder/job.sh" ] || [ -e "$folder/kit" ] || { echo "$folder is not a launch's" >&2 && return 2; }
    rm -rf "$folder"
    for each in "$parent"/*/kit; do
        [ ! -e "$each" ] || return 0 # another run uses the environments
    done
    rm -rf "$parent/.tuppence"
    [ "$parent" != "$HOME/tuppence" ] || rmdir "$parent" 2>/dev/null || true
}

main() {
    local verb=$1
    shift
    case $verb in
    probe | start | pane | job | environment | status | log | follow | stop | files | sums | take | clean) "$verb" "$@" ;;
    *) echo "ssh.sh: no $verb" >&2 && return 2 ;;
    esac
}

main "$@" </dev/null
exit
