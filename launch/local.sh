#!/usr/bin/env bash
# Train on this machine: finds the project's environment and calls its `ds-moe train`.
#
#   launch/local.sh [--dry-run] RUN.yaml N [key=value ...]
#
#   RUN.yaml    a run file, e.g. ds_configs/runs/demo.yaml
#   N           processes: one per GPU, or, without GPUs, CPU processes that share the cores
#   key=value   overrides of the run file, e.g. moe.ep_size=2 train.lr=1e-4
#   --dry-run   print the command and stop
#
# Environment: DS_ACCELERATOR=cpu forces the CPU; CUDA_VISIBLE_DEVICES picks GPUs (its first N are used);
# MASTER_PORT fixes the port (default: a free one); OMP_NUM_THREADS the threads of a CPU process (default: cores / N).
# The exit status is that of the run; stopping this script (Ctrl-C, SIGTERM) stops every rank.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.bash
source "$root/launch/common.bash"

options=()
case ${1:-} in
    -h | --help) show_help "$0"; exit 0 ;;
    -n | --dry-run) options=(--dry-run); shift ;;
esac
(($# >= 2)) && [[ $1 != -* ]] || die "usage: launch/local.sh [--dry-run] RUN.yaml N [key=value ...]"
bin=$(find_bin "$root")
need_program "$bin" ds-moe
exec "$bin/ds-moe" train "${options[@]}" --nproc "$2" "$1" "${@:3}"
