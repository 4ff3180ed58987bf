#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Usage: launch/slurm.sh [OPTIONS] -- train --config=... --workdir=/shared/runs/mine
#
# One job of Slurm, on GPUs; its processes find each other by Slurm. The checkout, its .venv and the workdir lie on a
# disk that all nodes share.
#
#   --nodes=1         how many
#   --gpus=8          of each node
#   --per=node        a process a node, or a process a gpu (--per=gpu)
#   --cpus=           CPU cores of each process; empty: what the cluster gives
#   --time=           limit, such as 24:00:00; empty: that of the partition
#   --partition=, --account=, --qos=, --name=hintsd
#   --save-s=300      seconds before the limit at which the processes are told to save
#   --restarts=20     how often the job goes back into the queue after exit status 75 or a death by a signal
#   --logs=logs       folder of the output, one file a job, relative to the current folder
#   --python=         the interpreter; empty: .venv/bin/python of the checkout
#   --dry-run         print the command that submits the job and those that run within it, run none

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
OPTIONS=([nodes]=1 [gpus]=8 [per]=node [cpus]="" [time]="" [partition]="" [account]="" [qos]="" [name]=hintsd)
OPTIONS+=([save-s]=300 [restarts]=20 [logs]=logs [python]="$REPO/.venv/bin/python" [inside]="")
GIVEN=() # again for the job
for word in "$@"; do [[ "$word" == --dry-run ]] || GIVEN+=("$word"); done
options "$@"
words_needed
for name in nodes gpus; do whole_number "$name" 1; done
for name in save-s restarts; do whole_number "$name" 0; done
[[ "${OPTIONS[per]}" =~ ^(node|gpu)$ ]] || fail "--per=${OPTIONS[per]} must be node or gpu"
TASKS=1
[[ "${OPTIONS[per]}" == gpu ]] && TASKS="${OPTIONS[gpus]}"

submit() { # from a shell of the login node
    local flags=(--job-name="${OPTIONS[name]}" --nodes="${OPTIONS[nodes]}" --gres=gpu:"${OPTIONS[gpus]}" --exclusive)
    flags+=(--ntasks-per-node="$TASKS" --requeue --open-mode=append --output="${OPTIONS[logs]}/%j.log")
    flags+=(--signal=TERM@"${OPTIONS[save-s]}") # to the processes, not to the shell of the job
    local name
    [[ -n "${OPTIONS[cpus]}" ]] && flags+=(--cpus-per-task="${OPTIONS[cpus]}")
    for name in time partition account qos; do
        [[ -n "${OPTIONS[$name]}" ]] && flags+=("--$name=${OPTIONS[$name]}")
    done
    run mkdir -p "${OPTIONS[logs]}"
    # Slurm runs a copy of a script, far from common.sh: so the job is a line that calls this very file.
    run sbatch "${flags[@]}" --wrap="$(shown exec bash "$HERE/slurm.sh" --inside "${GIVEN[@]}")"
}

processes() { # within the job
    local command=() flags=(--kill-on-bad-exit=0 --wait=120 --unbuffered --label) # the others say which process is missing
    [[ -n "${OPTIONS[cpus]}" ]] && flags+=(--cpus-per-task="${OPTIONS[cpus]}")
    # jax takes one GPU a process where Slurm started it, the one of its number on the node, unless this says otherwise.
    [[ "${OPTIONS[per]}" == node ]] && command+=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((OPTIONS[gpus] - 1)))")
    run srun "${flags[@]}" ${command[@]+"${command[@]}"} "${OPTIONS[python]}" -m hintsd_jax "${WORDS[@]}"
}

inside() {
    local status=0
    processes || status=$?
    if ((DRY_RUN)); then
        echo "# after exit status $TRY_AGAIN or a death by a signal, at most ${OPTIONS[restarts]} times:"
    else
        try_again "$status" || exit "$status"
        ((${SLURM_RESTART_COUNT:-0} < OPTIONS[restarts])) || fail "exit status $status after ${OPTIONS[restarts]} restarts: see --restarts"
        say "exit status $status: job ${SLURM_JOB_ID:-} goes back into the queue"
    fi
    run scontrol requeue "${SLURM_JOB_ID:-JOB}"
    exit "$status"
}

if [[ -n "${OPTIONS[inside]}" ]]; then inside; fi
submit
if ((DRY_RUN)); then
    echo "# within the job:"
    inside
fi
