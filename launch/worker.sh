#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Usage: launch/worker.sh install [EXTRAS [COMMAND]] | start WORDS... | status | stop
#
# What tpu_pod.sh calls on every worker of a slice; the state is in ~/.hintsd_jax (HINTSD_STATE names another folder).
#
#   install EXTRAS COMMAND  stop, .venv with the package and those extras (tpu,gs,s3), then a command such as "make bfcl"
#   start WORDS             the trainer with these words in the background, its output at the end of log
#   status                  one line: "none", "running", or "ended" and the exit status
#   stop                    tells the trainer to save and end, and waits for it

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
STATE="${HINTSD_STATE:-$HOME/.hintsd_jax}"
STOP_S=300 # that a trainer may need to save

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || echo unknown; } # a process id says nothing after a restart

running() {
    [[ -s "$STATE/pid" && ! -s "$STATE/status" && "$(cat "$STATE/boot")" == "$(boot)" ]] &&
        kill -0 "$(cat "$STATE/pid")" 2>/dev/null
}

install() { # Ubuntu 22.04, which TPU VMs have, comes with Python 3.10: uv brings a newer one
    stop
    cd "$REPO"
    python3 -m pip install --quiet --user uv
    "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 .venv
    "$HOME/.local/bin/uv" pip install --quiet --python .venv/bin/python --editable ".${1:+[$1]}"
    if [[ -n "${2:-}" ]]; then PATH="$REPO/.venv/bin:$PATH" bash -c "$2"; fi
}

start() {
    if running; then fail "the trainer runs already, as process $(cat "$STATE/pid"): stop it first"; fi
    mkdir -p "$STATE"
    rm -f "$STATE/pid" "$STATE/status"
    boot >"$STATE/boot"
    cd "$REPO"
    # Keys of an endpoint and the like: no command line shows them.
    # shellcheck disable=SC1091
    if [[ -f "$STATE/environment" ]]; then set -a && source "$STATE/environment" && set +a; fi
    # The shell around the trainer writes down how it ended; the signals of `stop` go to the trainer alone.
    # shellcheck disable=SC2016
    setsid nohup bash -c '
        "${@:2}" & echo $! >"$1/pid"
        wait $! && status=0 || status=$?
        echo "$status" >"$1/status"' - "$STATE" "${HINTSD_PYTHON:-$REPO/.venv/bin/python}" -m hintsd_jax "$@" \
        >>"$STATE/log" 2>&1 </dev/null &
    while [[ ! -s "$STATE/pid" ]]; do sleep 0.1; done
}

status() {
    if [[ ! -s "$STATE/pid" ]]; then
        echo none
    elif [[ -s "$STATE/status" ]]; then
        echo "ended $(cat "$STATE/status")"
    elif running; then
        echo running
    else
        echo "ended 137" # the machine was started again, or the shell around the trainer was killed with it
    fi
}

stop() {
    local waited=0
    running || return 0
    kill -s TERM "$(cat "$STATE/pid")" 2>/dev/null || true
    while running; do
        ((waited++ < STOP_S)) || kill -s KILL "$(cat "$STATE/pid")" 2>/dev/null || true
        sleep 1
    done
}

case "${1:-}" in
    install | start) "$@" ;;
    status | stop) "$1" ;;
    *) usage && exit 2 ;;
esac
