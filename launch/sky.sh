#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Usage: launch/sky.sh [OPTIONS] -- train --config=... --workdir=gs://bucket/runs/mine
#
# A managed job of SkyPilot, on any cloud or Kubernetes cluster that `sky check` lists: it finds the machines, and finds
# others when they are taken away. A process on each node; the hosts of a TPU slice are nodes.
#
#   --accelerators=H100:8   GPUs of a node, or a slice: tpu-v5litepod-16, tpu-v5p-64
#   --nodes=1               GPU nodes; of a slice always 1
#   --infra=                such as gcp, aws/us-east-1, k8s; empty: the cheapest
#   --spot                  machines that may be taken away
#   --setup=                a command for every node after the installation, such as "make bfcl"
#   --name=hintsd
#   --task=                 file to write the task to, instead of launching it
#   --dry-run               print the task and the command, run none

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
OPTIONS=([accelerators]=H100:8 [nodes]=1 [infra]="" [spot]="" [setup]="" [name]=hintsd [task]="")
options "$@"
words_needed
whole_number nodes 1
[[ "$(workdir)" == gs://* ]] ||
    fail "--workdir=$(workdir): the next machine has another disk, so that it must be gs://BUCKET/FOLDER"
EXTRA=cuda
if [[ "${OPTIONS[accelerators]}" == tpu-* ]]; then
    EXTRA=tpu
    runtime_version "${OPTIONS[accelerators]#tpu-}" >/dev/null
    ((OPTIONS[nodes] == 1)) || fail "--nodes=${OPTIONS[nodes]}: the hosts of a slice are its nodes already; leave it at 1"
fi

indented() { sed 's/^/  /'; }

quoted() { # as a word of YAML
    local value="${1//\\/\\\\}"
    printf '"%s"' "${value//\"/\\\"}"
}

setup_lines() {
    echo 'set -e'
    echo 'command -v uv >/dev/null || python3 -m pip install --quiet --user uv'
    # shellcheck disable=SC2016  # for the node
    echo 'export PATH="$HOME/.local/bin:$PATH"'
    echo 'uv venv --quiet --allow-existing --python 3.12 .venv'
    echo "uv pip install --quiet --python .venv/bin/python --editable '.[$EXTRA,gs,s3]'"
    [[ -z "${OPTIONS[setup]}" ]] || printf 'source .venv/bin/activate\n%s\n' "${OPTIONS[setup]}"
}

run_lines() { # a slice says by itself which host is which; GPU nodes have it from SkyPilot
    # shellcheck disable=SC2016  # for the node
    [[ "$EXTRA" == tpu ]] || echo 'if [ "$SKYPILOT_NUM_NODES" -gt 1 ]; then
  first="$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"
  set -- --config.distributed.coordinator="$first:8476" --config.distributed.processes="$SKYPILOT_NUM_NODES" \
    --config.distributed.process="$SKYPILOT_NODE_RANK"
else
  set --
fi'
    echo "exec .venv/bin/python -m hintsd_jax $(shown "${WORDS[@]}")$([[ "$EXTRA" == tpu ]] || echo ' "$@"')"
}

task() {
    echo "name: $(quoted "${OPTIONS[name]}")"
    echo "workdir: $(quoted "$REPO")"
    echo "num_nodes: ${OPTIONS[nodes]}"
    echo "resources:"
    echo "  accelerators: $(quoted "${OPTIONS[accelerators]}")"
    [[ "$EXTRA" == cuda ]] || echo "  accelerator_args: {runtime_version: $(runtime_version "${OPTIONS[accelerators]#tpu-}")}"
    [[ -z "${OPTIONS[infra]}" ]] || echo "  infra: $(quoted "${OPTIONS[infra]}")"
    [[ -z "${OPTIONS[spot]}" ]] || echo "  use_spot: true"
    echo "  job_recovery:"
    echo "    max_restarts_on_errors: 0"
    echo "    recover_on_exit_codes: [$TRY_AGAIN, 134, 137, 139, 143]"
    echo "setup: |"
    setup_lines | indented
    echo "run: |"
    run_lines | indented
}

if [[ -n "${OPTIONS[task]}" ]]; then
    task >"${OPTIONS[task]}"
    exit
fi
if ((DRY_RUN)); then
    task
    FILE=TASK
else
    FILE="$(mktemp --suffix=.yaml)"
    trap 'rm -f "$FILE"' EXIT
    task >"$FILE"
fi
run sky jobs launch --name="${OPTIONS[name]}" --yes "$FILE"
