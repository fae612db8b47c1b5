# shellcheck shell=bash
# Shared by the launch scripts; sourced, not run. Everything stays in arrays: no word of the user is ever evaluated.

die() { printf '%s: %s\n' "${0##*/}" "$1" >&2; exit 2; }

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

# check_count VALUE WHAT
check_count() { [[ $1 =~ ^[1-9][0-9]*$ ]] || die "$2 must be a positive whole number, not '$1'"; }

# cpu_settings RANKS: the array `settings` becomes what `ds-moe train` sets for CPU ranks (see ds_moe/launcher.py) but for
# TORCH_EXTENSIONS_DIR, which ranks find by themselves.
cpu_settings() {
    local cores
    cores=$(env -u OMP_NUM_THREADS nproc)
    settings=(
        "DS_ACCELERATOR=cpu"
        "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
        "MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}"
        "MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-34359738368}"
    )
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

# supervise TORCHRUN...: run it to its end; the status is its own, or 128 + the signal that this script got.
#
# It gets a session of its own: of the two signals that a Ctrl-C would make, the terminal's and ours, the second would
# end it before its ranks. A signal becomes a SIGTERM to torchrun, which hands it on; another one ends all at once.
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
    if [[ -z $signal ]]; then
        signal=$1
        kill -TERM "$launcher" 2>/dev/null || true
    else
        pkill -KILL -P "$launcher" || true
        kill -KILL "$launcher" 2>/dev/null || true
    fi
}

# quote_for_pdsh WORD...: the array `words` becomes the words as DeepSpeed's pdsh launcher must get them so that the
# shell on the other side sees them unchanged. It puts words that hold a space between double quotes, and no others.
quote_for_pdsh() {
    local word
    words=()
    for word in "$@"; do
        if [[ $word == *' '* ]]; then
            words+=("$(sed 's/[\\$`]/\\&/g' <<<"$word")")
        else
            words+=("$(printf '%q' "$word")")
        fi
    done
}
