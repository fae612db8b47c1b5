# shellcheck shell=bash
# Shared by the launch scripts; sourced, not run. Everything stays in arrays: no word of the user is ever evaluated.

die() { printf '%s: %s\n' "${program:-${0##*/}}" "$1" >&2; exit 2; }

# The comment block at the top of the calling script is its help.
show_help() { awk 'NR > 1 && !/^#/ {exit} NR > 1 && !/^#SBATCH/ {sub(/^# ?/, ""); print}' "$1"; }

# find_bin ROOT: folder of the environment to use: the active one, else ROOT/.venv, else that of python3 on PATH.
find_bin() {
    if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
        printf '%s\n' "$VIRTUAL_ENV/bin"
    elif [[ -x $1/.venv/bin/python ]]; then
        printf '%s\n' "$1/.venv/bin"
    elif command -v python3 >/dev/null; then
        dirname "$(command -v python3)"
    else
        die "no Python found: run 'make setup' in $1, or activate the environment ds_moe is installed in"
    fi
}

# need_program BIN NAME: a launcher of that environment must be there.
need_program() {
    [[ -x $1/$2 ]] || die "$1/$2 does not exist: run 'make setup', or activate the environment ds_moe is installed in"
}

# check_run RUN.yaml [key=value ...]
check_run() {
    (($#)) || die "no run file given (--help shows how)"
    [[ -f $1 ]] || die "run file '$1' does not exist"
    local override
    for override in "${@:2}"; do
        [[ $override == [!=]*=* && $override != -* ]] || die "'$override' is not an override of the form key=value"
    done
}

# number WORD: the word if it is a whole number, else 0.
number() { if [[ $1 =~ ^(0|[1-9][0-9]*)$ ]]; then echo "$1"; else echo 0; fi; }

# check_count VALUE WHAT
check_count() { [[ $1 =~ ^[1-9][0-9]*$ ]] || die "$2 must be a positive whole number, not '$1'"; }

# cpu_settings: the array `settings` becomes what `ds-moe train` sets for CPU ranks (see ds_moe/engine/cpu.py) but for
# OMP_NUM_THREADS and TORCH_EXTENSIONS_DIR: ranks find their share of their machine's cores, and the op, by themselves.
cpu_settings() {
    settings=(
        "DS_ACCELERATOR=cpu"
        "MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}"
        "MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-34359738368}"
    )
}

# find_gpus: `gpus` becomes the number of GPUs that this job may use on this machine, `why` what says so.
find_gpus() {
    local list
    why="CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}"
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then  # which torch obeys, whoever has set it
        if [[ $CUDA_VISIBLE_DEVICES =~ ^(|-1|NoDevFiles)$ ]]; then gpus=0; return; fi
        IFS=, read -ra list <<<"$CUDA_VISIBLE_DEVICES"
        gpus=${#list[@]}
        return
    fi
    why="SLURM_GPUS_ON_NODE=${SLURM_GPUS_ON_NODE:-}"
    if [[ ${SLURM_GPUS_ON_NODE:-} =~ ^[0-9]+$ ]]; then gpus=$SLURM_GPUS_ON_NODE; return; fi
    why="SLURM_GPUS_PER_NODE=${SLURM_GPUS_PER_NODE:-}"  # may begin with a type: a100:8
    if [[ ${SLURM_GPUS_PER_NODE:-} =~ ^([^,]*:)?([0-9]+)$ ]]; then gpus=${BASH_REMATCH[2]}; return; fi
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    why="nvidia-smi -L lists $gpus"
    if ((gpus)) && [[ $(scontrol show node "${SLURMD_NODENAME:-}" 2>/dev/null) =~ Gres=[^[:space:]]*gpu ]]; then
        gpus=0 why='SLURM keeps those of this node for jobs that ask for them (--gpus-per-node)'
    fi
}

# show_command WORD...: one line that can be pasted into a shell.
show_command() {
    local word line=
    for word in "$@"; do
        # NAME=value in front of a command must keep its = unquoted.
        if [[ $word =~ ^[A-Z_]+=[^[:space:]]*$ ]]; then line+=" $word"; else line+=" $(printf '%q' "$word")"; fi
    done
    printf '+%s\n' "$line"
}

# address_of HOST: its first address, as this machine resolves it.
address_of() { getent ahosts "$1" | awk '{print $1; exit}'; }

# is_here HOST: whether that is this machine.
is_here() { [[ $(ip -o route get "$(address_of "$1")" 2>/dev/null) == local* ]]; }

# find_interface HOST...: `interface` and `address` become those of this machine on the way to the first HOST that is
# another machine; if none is, those that carry HOST's address. Both stay empty where there is no telling.
#
# Left alone, gloo takes the interface of the address that the machine's own name has: on many 127.0.1.1.
find_interface() {
    local host route
    interface='' address=''
    for host in "$@"; do
        if is_here "$host"; then continue; fi
        route=$(ip -o route get "$(address_of "$host")" 2>/dev/null) || continue
        [[ $route =~ \ dev\ ([^\ ]+) ]] && interface=${BASH_REMATCH[1]}
        [[ $route =~ \ src\ ([^\ ]+) ]] && address=${BASH_REMATCH[1]}
        return 0
    done
    if is_here "$1"; then
        address=$(address_of "$1")
        interface=$(ip -o address show to "$address" | awk '{print $2; exit}')
    fi
}

# supervise LAUNCHER...: run it to its end; the status is its own, or 128 + the signal that this script got.
#
# It gets a session of its own: of the two signals that a Ctrl-C would make, the terminal's and ours, the second would
# end it before its ranks. A signal becomes a SIGTERM to torchrun, which hands it on, or, where the array `ask` is set,
# what this command (of ds_moe/launcher/ranks.py) sends to the ranks; another one ends all at once.
# A torchrun that has lost its store (the master is gone) does not even notice that its ranks have ended: it is killed.
supervise() {
    local status=0 stuck_s=0
    signal=''
    setsid "$@" &
    launcher=$!
    trap 'stop_launcher 2' INT
    trap 'stop_launcher 15' TERM
    trap 'stop_launcher 1' HUP
    while kill -0 "$launcher" 2>/dev/null; do
        sleep 1 || true
        # Ranks that have ended, and that torchrun has not collected, are zombies.
        if ps -o stat= --ppid "$launcher" | awk '/^Z/ {ended++} !/^Z/ {alive++} END {exit !(ended && !alive)}'; then
            if ((++stuck_s == 30)); then
                echo "${0##*/}: the ranks here have ended and torchrun does not notice: killed" >&2
                kill -KILL "$launcher"
            fi
        fi
    done
    wait "$launcher" || status=$?
    if [[ -n $signal ]] && ((status)); then status=$((128 + signal)); fi
    return "$status"
}

stop_launcher() {
    local asked=0
    if [[ -z $signal ]]; then
        signal=$1
        if [[ -z ${ask:-} ]]; then kill -TERM "$launcher" 2>/dev/null || true; return; fi
        asked=$("${ask[@]}" 15 "$launcher" || true)
        if ((asked)); then return; fi
    fi
    if [[ -n ${ask:-} ]]; then "${ask[@]}" 9 "$launcher" >/dev/null || true; fi
    pkill -KILL -P "$launcher" || true
    kill -KILL "$launcher" 2>/dev/null || true
}

# quote_for_pdsh WORD...: the array `words` becomes the words as DeepSpeed's pdsh launcher must get them so that the
# shell on the other side sees them unchanged. It puts words that hold a space between double quotes, and no others;
# pdsh itself replaces %h, %n and %u, and takes %% for %.
quote_for_pdsh() {
    local word
    words=()
    for word in "$@"; do
        if [[ $word == *' '* ]]; then
            word=$(sed 's/[\\$`]/\\&/g' <<<"$word")
        else
            word=$(printf '%q' "$word")
        fi
        words+=("${word//%/%%}")
    done
}
