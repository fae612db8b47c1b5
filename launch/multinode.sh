#!/usr/bin/env bash
# Train on several machines that share this folder's path (same checkout, same environment).
#
# From one machine, through ssh (needs pdsh and passwordless ssh to every host of the file):
#   launch/multinode.sh [--dry-run] --hostfile FILE [--launcher pdsh|openmpi|mpich] [--port P] RUN.yaml [key=value ...]
#
# Or by hand, the same line on every machine (no ssh):
#   launch/multinode.sh [--dry-run] --nodes N --gpus G --master HOST[:PORT] [--id NAME] RUN.yaml [key=value ...]
#
#   --hostfile  lines "host slots=GPUS"; see launch/hostfile.example
#   --nodes     machines of the job                  --gpus   processes on each
#   --master    host (and port, default 29500) of the first machine; reachable from all others
#   --id        name of the job: must be equal on all machines (default: ds_moe)
#   --dry-run   print the command and stop
#
# The ssh form passes on only variables that begin with NCCL, PYTHON, UCX, MV2 or MLFLOW; put others as NAME=value
# lines into .deepspeed_env (do not commit it).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.bash
source "$root/launch/common.bash"

dry_run=no hostfile='' launcher=pdsh port=29500 nodes='' gpus='' master='' id=ds_moe
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help) show_help "$0"; exit 0 ;;
        -n | --dry-run) dry_run=yes; shift; continue ;;
        --hostfile | --launcher | --port | --nodes | --gpus | --master | --id)
            (($# >= 2)) || die "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) die "unknown option '$1' (--help lists them)" ;;
    esac
done
check_run "$@"
check_count "$port" "--port"
bin=$(find_bin "$root")

if [[ -n $hostfile ]]; then
    [[ -z $nodes$gpus$master ]] || die "--hostfile and --nodes/--gpus/--master are two ways to start; give one"
    # DeepSpeed itself would go on with this machine alone, with no more than a warning.
    [[ -f $hostfile ]] || die "hostfile '$hostfile' does not exist"
    need_program "$bin" deepspeed
    if [[ $launcher == pdsh && $dry_run == no ]]; then
        command -v pdsh >/dev/null || die "pdsh is not installed: install it, or give --launcher openmpi, or use --nodes"
    fi
    command=("$bin/deepspeed" --hostfile "$hostfile" --launcher "$launcher" --master_port "$port"
        --module ds_moe.train "$@")
else
    [[ -n $nodes && -n $gpus && -n $master ]] || die "give --hostfile FILE, or --nodes N --gpus G --master HOST"
    check_count "$nodes" "--nodes"
    check_count "$gpus" "--gpus"
    [[ $master == *:* ]] || master+=":$port"
    need_program "$bin" torchrun
    settings=()
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then
        cpu_settings "$gpus"
        settings=(env "${settings[@]}")
    fi
    command=("${settings[@]}" "$bin/torchrun" --nnodes "$nodes" --nproc_per_node "$gpus" --rdzv_backend c10d --rdzv_endpoint "$master"
        --rdzv_id "$id" --module ds_moe.train "$@")
fi
show_command "${command[@]}"
if [[ $dry_run == yes ]]; then exit 0; fi
exec "${command[@]}"
