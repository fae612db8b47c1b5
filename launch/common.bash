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
