#!/usr/bin/env bash
# Runs a command on one machine of a job, with what only that machine knows; the other scripts start it there.
#
#   launch/on_node.sh HOST[,HOST ...] COMMAND ...
#
# HOSTs are those of the job. GLOO_SOCKET_IFNAME becomes the interface that leads to them, unless it is set. Under SLURM
# torchrun is told its node's rank, and to write its logs to a folder of the node's own below LOG_DIR.
set -euo pipefail
# USR1 stops a run with a checkpoint, and SLURM sends it to every process. Ignored here, it stays ignored in all that
# this starts, torchrun above all, which would die of it; ranks install a handler of their own.
trap '' USR1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.bash
source "$root/launch/common.bash"

IFS=, read -ra hosts <<<"$1"
shift
if [[ -z ${GLOO_SOCKET_IFNAME:-} ]] && ((${#hosts[@]} > 1)); then
    find_interface "${hosts[@]}"
    if [[ -n $interface ]]; then export GLOO_SOCKET_IFNAME=$interface; fi
fi
if [[ -n ${SLURM_NODEID:-} ]]; then
    find_gpus
    if [[ ${DS_ACCELERATOR:-cuda} == cuda ]] && ((gpus < RANKS_PER_NODE)); then
        die "$(hostname) has $gpus GPU(s) for $RANKS_PER_NODE ranks ($why): give sbatch --gpus-per-node"
    fi
    # torchrun reads its options from PET_ variables, too.
    export PET_NODE_RANK=$SLURM_NODEID PET_LOG_DIR=$LOG_DIR/node$SLURM_NODEID
    mkdir -p "$PET_LOG_DIR"
fi
exec "$@"
