#!/usr/bin/env bash
# One run on several machines without a scheduler: start it on each of them, the first one first.
#   first machine:   launch/two_hosts.sh 0 HOST-OF-THE-FIRST ddp_nodes.yaml --config launch/recipes/dpo.yaml
#   second machine:  launch/two_hosts.sh 1 HOST-OF-THE-FIRST ddp_nodes.yaml --config launch/recipes/dpo.yaml
# Environment: MACHINES (2), GPUS per machine (8), PORT (29500). output_dir and ALIGN_CACHE must be on a file system that
# all machines see. Without GPUs, name the network interface: GLOO_SOCKET_IFNAME=eth0.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
rank=$1 main=$2 engine=$3
shift 3
machines=${MACHINES:-2}
# How long the launcher waits after SIGTERM for the checkpoint; its default is half a minute.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
exec "${LAUNCHER:-.venv/bin/accelerate}" launch --config_file "launch/accelerate/$engine" \
    --num_machines "$machines" --num_processes "$((machines * ${GPUS:-8}))" --machine_rank "$rank" \
    --main_process_ip "$main" --main_process_port "${PORT:-29500}" align/train.py "$@"
