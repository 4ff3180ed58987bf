#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Usage: launch/local.sh [OPTIONS] -- train --config=desk_smoke --workdir=runs/desk_smoke
#
# Several processes of one run on this machine; they find each other at a free port. Process 0 has the terminal, lines
# of the others begin with their number.
#
#   --processes=2     how many
#   --devices=0       CPU devices of each, made up (to try a pod without one); 0: real devices
#   --gpus=0          GPUs of each: process 0 gets the first ones, and so on; 0: they are not shared out
#   --port=           of process 0; empty: a free one
#   --restarts=20     how often all are started again after exit status 75 or a death by a signal; 0: never
#   --grace=60        seconds that the others have to end by themselves after one has ended by an error
#   --python=         the interpreter; empty: .venv/bin/python of the checkout if there is one, else python3
#   --dry-run         print the commands of the processes, run none
#
# Ctrl-C or SIGTERM reaches every process once: they save and end; a second one ends them at once. The exit status is
# the trainer's; 75 after SIGTERM, 130 after Ctrl-C.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
OPTIONS=([processes]=2 [devices]=0 [gpus]=0 [port]="" [restarts]=20 [grace]=60 [python]="")
options "$@"
words_needed
whole_number processes 1
for name in devices gpus restarts grace; do whole_number "$name" 0; done
((OPTIONS[devices] == 0 || OPTIONS[gpus] == 0)) || fail "--devices makes up CPU devices, --gpus shares out real ones: give one"
PYTHON="${OPTIONS[python]}"
if [[ -z "$PYTHON" ]]; then
    PYTHON=python3
    [[ -x "$REPO/.venv/bin/python" ]] && PYTHON="$REPO/.venv/bin/python"
fi
# A session of its own: Ctrl-C at the terminal then reaches the script alone, which passes it on once.
OWN_SESSION='import os, signal, sys
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)
os.execvp(sys.argv[1], sys.argv[1:])'
FREE_PORT='import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'

PIDS=()
TOLD=0 # how many of them a signal that reached the script has been passed on to

pass_on() { # a signal that reached the script goes to every process
    STOPPED="$1"
    TOLD=${#PIDS[@]}
    for pid in "${PIDS[@]}"; do kill -s TERM "$pid" 2>/dev/null || true; done
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM
trap 'pass_on HUP' HUP

command_of() { # sets COMMAND, of process $1 with its coordinator at port $2
    local variables=() flags=() first threads cores
    if ((OPTIONS[devices])); then
        variables+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${OPTIONS[devices]}")
        # Twice the threads that XLA takes for as many devices: where all of them wait for each other in a sum, what
        # the last device needs must not be queued behind them.
        threads=$((2 * OPTIONS[devices])) cores="$(getconf _NPROCESSORS_ONLN)"
        variables+=("PJRT_NPROC=${PJRT_NPROC:-$((threads > cores ? threads : cores))}")
        # jax keeps compiled programs for process 0 alone, which would then be far ahead; CPUs wait 30 s for one another.
        ((OPTIONS[processes] > 1)) && variables+=(JAX_ENABLE_COMPILATION_CACHE=false)
    elif ((OPTIONS[gpus])); then
        first=$(($1 * OPTIONS[gpus]))
        variables+=("CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + OPTIONS[gpus] - 1)))")
    fi
    if ((OPTIONS[processes] > 1)); then
        flags+=(--config.distributed.coordinator="127.0.0.1:$2" --config.distributed.processes="${OPTIONS[processes]}")
        flags+=(--config.distributed.process="$1")
    fi
    COMMAND=()
    ((${#variables[@]})) && COMMAND+=(env "${variables[@]}")
    COMMAND+=("$PYTHON" -m hintsd_jax "${WORDS[@]}" ${flags[@]+"${flags[@]}"})
}

alive() {
    local pid
    for pid in "${PIDS[@]}"; do kill -0 "$pid" 2>/dev/null && return 0; done
    return 1
}

some_failed() { # whether a process has ended by an error; the others then have --grace seconds
    local number status
    for number in "${!PIDS[@]}"; do
        if [[ -z "${ENDED[$number]:-}" ]] && ! kill -0 "${PIDS[$number]}" 2>/dev/null; then
            status=0
            wait "${PIDS[$number]}" || status=$?
            ENDED[number]=$status
        fi
        [[ "${ENDED[$number]:-0}" == 0 ]] || return 0
    done
    return 1
}

all_processes() { # starts them, waits for all; the exit status is that of `together`
    local number port="${OPTIONS[port]}" failed_at="" told="" statuses=()
    [[ -n "$port" ]] || { if ((DRY_RUN)); then port=PORT; else port="$("$PYTHON" -c "$FREE_PORT")"; fi; }
    PIDS=() ENDED=()
    for ((number = 0; number < OPTIONS[processes]; number++)); do
        command_of "$number" "$port"
        if ((DRY_RUN)); then
            shown "${COMMAND[@]}"
        elif ((number == 0)); then
            "$PYTHON" -c "$OWN_SESSION" "${COMMAND[@]}" &
            PIDS+=($!)
        else
            "$PYTHON" -c "$OWN_SESSION" "${COMMAND[@]}" </dev/null > >(sed -u "s/^/[$number] /") 2> >(sed -u "s/^/[$number] /" >&2) &
            PIDS+=($!)
        fi
    done
    ((DRY_RUN)) && return 0
    if [[ -n "$STOPPED" ]]; then # while they were started: to those that were not there yet
        for pid in "${PIDS[@]:TOLD}"; do kill -s TERM "$pid" 2>/dev/null || true; done
    fi
    while alive; do
        sleep 0.2 || true
        if some_failed; then
            failed_at="${failed_at:-$SECONDS}"
            if ((SECONDS - failed_at >= 2 * OPTIONS[grace])); then
                for pid in "${PIDS[@]}"; do kill -s KILL "$pid" 2>/dev/null || true; done
            elif ((SECONDS - failed_at >= OPTIONS[grace])) && [[ -z "$told" ]]; then
                told=1
                say "a process has ended and the others have not within ${OPTIONS[grace]} s: they are told to"
                for pid in "${PIDS[@]}"; do kill -s TERM "$pid" 2>/dev/null || true; done
            fi
        fi
    done
    for number in "${!PIDS[@]}"; do
        status="${ENDED[$number]:-}"
        if [[ -z "$status" ]]; then
            status=0
            wait "${PIDS[$number]}" || status=$?
        fi
        statuses+=("$status")
    done
    return "$(together "${statuses[@]}")"
}

status=0
again "${OPTIONS[restarts]}" all_processes || status=$?
if [[ -n "$STOPPED" ]] && try_again "$status"; then
    [[ "$STOPPED" == INT ]] && exit 130
    exit "$TRY_AGAIN"
fi
exit "$status"
