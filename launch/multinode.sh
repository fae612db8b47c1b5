#!/usr/bin/env bash
# Train on several machines that share this folder's path (same checkout, same environment).
#
# From one machine, through ssh (needs pdsh and passwordless ssh to every host of the file):
#   launch/multinode.sh [--dry-run] --hostfile FILE [--launcher pdsh|openmpi|mpich] [--port P] RUN.yaml [key=value ...]
#
# Or by hand, the same line on every machine (no ssh):
#   launch/multinode.sh [--dry-run] --nodes N --gpus G --master HOST[:PORT] [--id NAME] RUN.yaml [key=value ...]
#
#   --hostfile   lines "host slots=GPUS"; see launch/hostfile.example
#   --nodes      machines of the job                  --gpus   processes on each
#   --master     host (and port, default 29500) of the first machine; reachable from all others
#   --id         name of the job: must be equal on all machines (default: ds_moe)
#   --interface  network interface, on every machine, of what ranks send one another (GLOO_SOCKET_IFNAME and
#                NCCL_SOCKET_IFNAME). Default: for gloo the one that leads to the other machines; NCCL finds its own
#   --dry-run    print the command and stop
#
# Ctrl-C or SIGTERM on one machine (through ssh: to this script) ends the job everywhere, with a checkpoint; a second
# one without (docs/launch.md).
#
# The ssh form passes on only variables that begin with NCCL, PYTHON, UCX, MV2 or MLFLOW; put others as NAME=value
# lines into .deepspeed_env (do not commit it).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.bash
source "$root/launch/common.bash"

dry_run=no hostfile='' launcher=pdsh port=29500 nodes='' gpus='' master='' id=ds_moe network=()
while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help) show_help "$0"; exit 0 ;;
        -n | --dry-run) dry_run=yes; shift; continue ;;
        --interface)
            [[ -n ${2:-} ]] || die "--interface needs a value"
            network=("GLOO_SOCKET_IFNAME=$2" "NCCL_SOCKET_IFNAME=$2")
            shift 2
            ;;
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

settings=()
if [[ -n $hostfile ]]; then
    [[ -z $nodes$gpus$master ]] || die "--hostfile and --nodes/--gpus/--master are two ways to start; give one"
    need_program "$bin" deepspeed
    listed=$("$bin/python" -m ds_moe.launcher.hostfile "$hostfile") || exit 2
    if [[ $launcher == pdsh && $dry_run == no ]]; then
        command -v pdsh >/dev/null || die "pdsh is not installed: install it, or give --launcher openmpi, or use --nodes"
    fi
    mapfile -t hosts < <(awk '{sub(/.*@/, "", $1); print $1}' <<<"$listed")  # [user@]name slots
    every_host=$(printf '%s,' "${hosts[@]}")
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then cpu_settings; fi
    if [[ -n ${OMP_NUM_THREADS:-} ]]; then settings+=("OMP_NUM_THREADS=$OMP_NUM_THREADS"); fi
    settings+=("${network[@]}")
    # Every rank is started through on_node.sh. DeepSpeed's own choice of an address for the master is the first that
    # `hostname -I` prints there, which may be that of a bridge.
    words=(env "${settings[@]}" bash "$root/launch/on_node.sh" "${every_host%,}" "$bin/python" -u -m ds_moe.train "$@")
    far=()
    if ((${#hosts[@]} > 1)) || ! is_here "${hosts[0]}"; then
        far=(--force_multi)  # of one host DeepSpeed takes for granted that it is this machine
        if [[ $launcher == pdsh ]]; then quote_for_pdsh "${words[@]}"; fi
    fi
    command=("$bin/deepspeed" --hostfile "$hostfile" --launcher "$launcher" "${far[@]}" --master_addr "${hosts[0]}"
        --master_port "$port" --no_local_rank --no_python "${words[@]}")
    ask=("$bin/python" -m ds_moe.launcher.ranks)
else
    [[ -n $nodes && -n $gpus && -n $master ]] || die "give --hostfile FILE, or --nodes N --gpus G --master HOST"
    check_count "$nodes" "--nodes"
    check_count "$gpus" "--gpus"
    [[ $master == *:* ]] || master+=":$port"
    need_program "$bin" torchrun
    if [[ ${DS_ACCELERATOR:-} == cpu ]]; then cpu_settings; fi
    here=()
    if ((nodes > 1)) && [[ ${master%:*} != localhost ]] && command -v ip >/dev/null; then
        # Left alone, torchrun asks the machine's own name for its address, and whether it is the master.
        find_interface "${master%:*}"
        if [[ $interface == lo ]]; then
            die "'${master%:*}' is $address on this machine: give --master the address that the other machines reach"
        fi
        if is_here "${master%:*}"; then here=(--rdzv_conf is_host=true); else here=(--rdzv_conf is_host=false); fi
        if [[ -n $address ]]; then here+=(--local_addr "$address"); fi
        if ((${#network[@]} == 0)) && [[ -n $interface ]]; then
            network=("GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}")
        fi
    fi
    settings+=("${network[@]}")
    if ((${#settings[@]})); then settings=(env "${settings[@]}"); fi
    # Ranks that are told to end have train.stop_within_s for a checkpoint (120 s); torchrun's patience is longer.
    command=("${settings[@]}" "$bin/torchrun" --nnodes "$nodes" --nproc_per_node "$gpus" --rdzv_backend c10d
        --rdzv_endpoint "$master" --rdzv_id "$id" "${here[@]}"
        --shutdown_timeout "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}" --module ds_moe.train "$@")
    # torchrun would die of a USR1, which stops ranks with a checkpoint; they install a handler of their own.
    trap '' USR1
fi
show_command "${command[@]}"
if [[ $dry_run == yes ]]; then exit 0; fi
if [[ -n $hostfile && $launcher != pdsh ]]; then exec "${command[@]}"; fi
supervise "${command[@]}"
