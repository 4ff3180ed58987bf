#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Usage: launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- train --config=... --workdir=gs://...]
#
# One run on a Cloud TPU slice: a process on each of its hosts, which find each other by the slice itself.
#
#   up        create or reuse the slice, install, start, follow; whatever ends the run by status 75 or takes the slice
#             away (spot) is followed by another try. Ends as the run ends; leave it running in a tmux
#   create    the slice alone, unless it is there already; waits until it is ready
#   install   this checkout (what is committed) onto every worker, with --setup
#   start     the trainer on every worker
#   status    state of the slice, and of the trainer on every worker
#   logs      the output of --worker, as it comes
#   stop      tells the trainers to save and end; the slice stays, and costs
#   delete    the slice and its queued resource
#
#   --name=           of the slice, and of its queued resource
#   --zone=           such as us-central1-a
#   --project=        empty: gcloud's own
#   --type=v5litepod-16   accelerator type: v5litepod-16, v5p-64, v6e-16, v4-32
#   --version=        of the TPU VM's software; empty: that of the type
#   --spot            cheaper, and taken away at any time
#   --reserved        from your reservation
#   --direct          without a queue: the slice now, or an error
#   --setup=          a command for every worker after the installation, such as "make bfcl"
#   --internal-ip     reach the workers by their internal addresses
#   --worker=0        whose output `logs` and `up` follow
#   --restarts=100    most further tries of `up`
#   --poll=60         seconds between two looks of `up`
#   --dry-run         print every command, run none

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
OPTIONS=([name]="" [zone]="" [project]="" [type]=v5litepod-16 [version]="" [spot]="" [reserved]="" [direct]="")
OPTIONS+=([setup]="" [internal-ip]="" [worker]=0 [restarts]=100 [poll]=60)
COMMAND="${1:-}"
case "$COMMAND" in
    up | create | install | start | status | logs | stop | delete) shift ;;
    --help | -h) usage && exit 0 ;;
    *) fail "'$COMMAND' is no command of tpu_pod.sh: see --help" ;;
esac
options "$@"
needed name zone
whole_number restarts 0
whole_number poll 1
FOLDER=hintsd_jax # of the checkout on the workers
AT=(--zone="${OPTIONS[zone]}")
[[ -n "${OPTIONS[project]}" ]] && AT+=(--project="${OPTIONS[project]}")
ON=("${AT[@]}")
[[ -n "${OPTIONS[internal-ip]}" ]] && ON+=(--internal-ip)
NAME="${OPTIONS[name]}"
TPUS=(gcloud compute tpus)

# --- looking: these commands change nothing, and are not printed by --dry-run but for `status` and `logs`

slice_state() { # READY, PREEMPTED, ...; empty: there is none
    "${TPUS[@]}" tpu-vm describe "$NAME" "${AT[@]}" --format='value(state)' 2>/dev/null || true
}

queue_state() { # ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED, ...; empty: there is none
    "${TPUS[@]}" queued-resources describe "$NAME" "${AT[@]}" --format='value(state.state)' 2>/dev/null || true
}

on_worker() { # --worker and a command
    run "${TPUS[@]}" tpu-vm ssh "$NAME" "${ON[@]}" --worker="$1" --command="$2"
}

# --- the commands

create() {
    local wanted=(--accelerator-type="${OPTIONS[type]}") kind="" version
    version="${OPTIONS[version]:-$(runtime_version "${OPTIONS[type]}")}" || exit
    [[ -n "${OPTIONS[spot]}" ]] && kind=--spot
    [[ -n "${OPTIONS[reserved]}" ]] && kind=--reserved
    if ((!DRY_RUN)); then
        case "$(slice_state)" in
            READY) say "$NAME is there and ready: reused" && return ;;
            "") [[ "$(queue_state)" =~ ^(SUSPENDED|FAILED)$ ]] && delete ;;
            PREEMPTED | TERMINATED | STOPPED) delete ;;
        esac
    fi
    if [[ -n "${OPTIONS[direct]}" ]]; then
        run "${TPUS[@]}" tpu-vm create "$NAME" "${AT[@]}" "${wanted[@]}" --version="$version" ${kind:+"$kind"}
        return
    fi
    if ((DRY_RUN)) || [[ -z "$(queue_state)" ]]; then
        run "${TPUS[@]}" queued-resources create "$NAME" --node-id="$NAME" "${AT[@]}" "${wanted[@]}" \
            --runtime-version="$version" ${kind:+"$kind"}
    fi
    ((DRY_RUN)) || wait_until_ready
}

wait_until_ready() {
    local state before=""
    while :; do
        state="$(queue_state)"
        [[ "$state" == "$before" ]] || say "queued resource $NAME: ${state:-gone}"
        before="$state"
        case "$state" in
            ACTIVE) [[ "$(slice_state)" == READY ]] && return ;;
            FAILED | SUSPENDED | "") return "$TRY_AGAIN" ;;
        esac
        sleep "${OPTIONS[poll]}"
    done
}

install() {
    local archive=/tmp/hintsd_jax.$$.tar.gz
    run git -C "$REPO" archive --format=tar.gz --output="$archive" HEAD &&
        run "${TPUS[@]}" tpu-vm scp "$archive" "$NAME:$FOLDER.tar.gz" "${ON[@]}" --worker=all &&
        run rm -f "$archive" &&
        on_worker all "mkdir -p $FOLDER && tar -xzf $FOLDER.tar.gz -C $FOLDER && $(shown "$FOLDER/launch/worker.sh" install tpu,gs,s3 "${OPTIONS[setup]}")"
}

words_for_a_slice() { # every worker has a disk of its own, and a slice that goes takes them along
    words_needed
    [[ "$(workdir)" == gs://* ]] ||
        fail "--workdir=$(workdir): the workers of a slice share no disk, so that it must be gs://BUCKET/FOLDER"
}

start() {
    on_worker all "$(shown "$FOLDER/launch/worker.sh" start "${WORDS[@]}")"
}

status() {
    run "${TPUS[@]}" queued-resources list "${AT[@]}" --filter="name~/$NAME\$"
    on_worker all "$FOLDER/launch/worker.sh status"
}

logs() { on_worker "${OPTIONS[worker]}" "tail -n 100 -F ~/.hintsd_jax/log"; }

stop() { on_worker all "$FOLDER/launch/worker.sh stop"; }

delete() {
    if [[ -n "${OPTIONS[direct]}" ]]; then
        run "${TPUS[@]}" tpu-vm delete "$NAME" "${AT[@]}" --quiet
    else
        run "${TPUS[@]}" queued-resources delete "$NAME" "${AT[@]}" --force --quiet
    fi
}

one_try() { # of `up`: the run's exit status, or 75 where the slice went away
    local follower=""
    create || return "$TRY_AGAIN"
    install || return "$TRY_AGAIN"
    start || return "$TRY_AGAIN"
    if ((DRY_RUN)); then
        logs
        status
        return 0
    fi
    logs &
    follower=$!
    local outcome=0
    until_ended || outcome=$?
    kill "$follower" 2>/dev/null || true
    return "$outcome"
}

until_ended() { # looks at the workers until all have ended; the exit status is that of `together`
    local seen line statuses=()
    while :; do
        sleep "${OPTIONS[poll]}"
        if ! seen="$("${TPUS[@]}" tpu-vm ssh "$NAME" "${ON[@]}" --worker=all --command="$FOLDER/launch/worker.sh status" 2>/dev/null)"; then
            [[ "$(slice_state)" == READY ]] && continue # ssh alone failed
            say "the slice is $(queue_state)"
            return "$TRY_AGAIN"
        fi
        [[ "$seen" == *running* ]] && continue
        statuses=()
        while read -r line; do
            [[ "$line" == ended\ * ]] && statuses+=("${line#ended }")
        done <<<"$seen"
        ((${#statuses[@]})) || return "$TRY_AGAIN" # a slice that was made again: nothing was started on it
        return "$(together "${statuses[@]}")"
    done
}

case "$COMMAND" in
    up)
        words_for_a_slice
        trap 'say "the run goes on; to end it: tpu_pod.sh stop, and delete"; exit 130' INT TERM
        status=0
        again "${OPTIONS[restarts]}" one_try || status=$?
        ((DRY_RUN)) || say "the run has ended with exit status $status; the slice is still there, and costs: tpu_pod.sh delete"
        exit "$status"
        ;;
    start) words_for_a_slice && start ;;
    *) "$COMMAND" ;;
esac
