#!/usr/bin/env bash
# Train on this machine with the DeepSpeed launcher.
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

dry_run=no
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help) show_help "$0"; exit 0 ;;
        -n | --dry-run) dry_run=yes ;;
        *) die "unknown option '$1' (--help lists them)" ;;
    esac
    shift
done
(($# >= 2)) || die "usage: launch/local.sh [--dry-run] RUN.yaml N [key=value ...]"
run=$1 ranks=$2
shift 2
check_count "$ranks" "N, the number of processes,"
check_run "$run" "$@"

bin=$(find_bin "$root")
need_program "$bin" deepspeed
python=$bin/python
[[ -x $python ]] || python=$bin/python3
devices=0
if [[ ${DS_ACCELERATOR:-} != cpu ]]; then
    devices=$("$python" -c 'import torch; print(torch.accelerator.device_count())') ||
        die "$python cannot import torch: run 'make setup', or activate the environment ds_moe is installed in"
fi

settings=()
processes=(--num_accelerators "$ranks")
if ((devices == 0)); then
    cpu_settings "$ranks"
    # The op that DeepSpeed compiles for CPU runs lives in the environment; see tools/build_ops.py.
    if [[ -z ${TORCH_EXTENSIONS_DIR:-} && -f $bin/../pyvenv.cfg ]]; then
        TORCH_EXTENSIONS_DIR=$(cd "$bin/.." && pwd)/torch_extensions
    fi
    if [[ -n ${TORCH_EXTENSIONS_DIR:-} ]]; then settings+=("TORCH_EXTENSIONS_DIR=$TORCH_EXTENSIONS_DIR"); fi
elif ((ranks > devices)); then
    die "$ranks processes asked for, but $devices accelerator(s) are visible here; DS_ACCELERATOR=cpu runs on the CPU"
elif [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        die "CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES': DeepSpeed's launcher takes device numbers only, e.g. 0,1"
    # With --num_accelerators the launcher would ignore the choice of devices; without, it takes all of the list.
    settings+=("CUDA_VISIBLE_DEVICES=$(cut -d, -f"1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
    processes=()
fi

port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
command=(env "${settings[@]}" "$bin/deepspeed" "${processes[@]}" --master_port "$port" --module ds_moe.train "$run" "$@")
show_command "${command[@]}"
if [[ $dry_run == yes ]]; then exit 0; fi
op=${TORCH_EXTENSIONS_DIR:-nowhere}/deepspeed_shm_comm
if ((devices == 0)) && [[ ! -f $op/deepspeed_shm_comm.so || -e $op/lock ]]; then
    # Compiles the op, or clears a killed build's lock, before any rank would wait for it without a word.
    env "${settings[@]}" "$python" "$root/tools/build_ops.py" || die "DeepSpeed's CPU op could not be built (see above)"
fi

# The launcher does not pass a SIGTERM on to its ranks: run it as a process group of its own and signal the group.
set -m
"${command[@]}" </dev/null &
group=$!
set +m
# shellcheck disable=SC2329  # called by the traps
stop() {
    trap '' INT TERM
    kill -s TERM -- "-$group" 2>/dev/null || true
    for _ in {1..150}; do
        kill -0 -- "-$group" 2>/dev/null || exit "$1"
        sleep 0.2
    done
    kill -s KILL -- "-$group" 2>/dev/null || true
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
status=0
wait "$group" || status=$?
exit "$status"
