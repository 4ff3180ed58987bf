# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# What the launch scripts share; each reads this file. Options go in by `option`, commands out by `run`, which prints
# them instead where --dry-run was given. The trainer's words stand behind `--`.

set -euo pipefail

DRY_RUN=0
WORDS=()    # of the trainer: train --config=... --workdir=...
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck disable=SC2034  # for the scripts
REPO="$(dirname "$HERE")"

# Exit statuses of the trainer: 0 done, 1 a bug (or a plan that does not fit), 2 the user's to mend, 130 Ctrl-C, and 75
# where the same command continues. A shell has 128 + n of a process that signal n ended.
TRY_AGAIN=75
SHORT_S=60        # a try that lives for less got nowhere
SHORT_TRIES=5     # so many of them in a row are not repeated any more

fail() { # one line for the person who called, and exit status 2
    printf 'error: %s\n' "$*" >&2
    exit 2
}

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2; }

shown() { # a command as it can be pasted into a shell; words that need no quotes have none
    local word text=()
    for word in "$@"; do
        [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="${word@Q}"
        text+=("$word")
    done
    printf '%s\n' "${text[*]}"
}

run() {
    if ((DRY_RUN)); then shown "$@"; else "$@"; fi
}

usage() { # the comment at the head of the script
    sed -n '/^# Usage/,/^[^#]/{/^#/{s/^# \{0,1\}//;p;};}' "$0"
}

# Reads --name=value options into the variables that the script declared as OPTIONS[name]=default, and what stands
# behind -- into WORDS.
declare -A OPTIONS=()
options() {
    local word name
    while (($#)); do
        word="$1" && shift
        case "$word" in
            --) WORDS=("$@") && return ;;
            --help | -h) usage && exit 0 ;;
            --dry-run) DRY_RUN=1 ;;
            --*)
                name="${word%%=*}" && name="${name#--}"
                [[ -v OPTIONS[$name] ]] || fail "--$name is no option of $(basename "$0"): see --help"
                if [[ "$word" == *=* ]]; then OPTIONS[$name]="${word#*=}"; else OPTIONS[$name]=1; fi
                ;;
            *) fail "unexpected word '$word': the trainer's words stand behind --, as in -- train --config=desk" ;;
        esac
    done
}

whole_number() { # --name's value, at least $2
    local value="${OPTIONS[$1]}"
    if [[ ! "$value" =~ ^[0-9]+$ ]] || ((10#$value < $2)); then fail "--$1=$value must be a whole number of $2 or more"; fi
}

words_needed() {
    ((${#WORDS[@]})) || fail "nothing to run: give the trainer's words behind --, as in -- train --config=desk --workdir=runs/desk"
    [[ "${WORDS[*]}" != *--config.distributed.* ]] || fail "--config.distributed.* is what this script sets: leave it out"
}

needed() { # options that must have a value
    local name
    for name in "$@"; do [[ -n "${OPTIONS[$name]}" ]] || fail "--$name is missing: see --help"; done
}

workdir() { # of the trainer's words; empty if there is none
    local word previous=""
    for word in "${WORDS[@]}"; do
        case "$word" in --workdir=*) printf '%s' "${word#*=}" && return ;; esac
        [[ "$previous" != --workdir ]] || { printf '%s' "$word" && return; }
        previous="$word"
    done
}

runtime_version() { # of a TPU VM's software, by its accelerator type
    case "$1" in
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "$1 is no TPU type known here: v5litepod-16, v5p-64, v6e-16, v4-32, ... (tpu_pod.sh takes others with --version)" ;;
    esac
}

try_again() { # whether the same command continues after this exit status
    (($1 == TRY_AGAIN || ($1 > 128 && $1 != 130)))
}

# The exit status of all from those of each: what a person must see comes first, then what is tried again.
together() {
    local status found=0
    for status in "$@"; do
        ((status == 0)) && continue
        if ! try_again "$status"; then
            if ((found == 0)) || try_again "$found"; then found=$status; fi
        elif ((found == 0)); then
            found=$status
        fi
    done
    printf '%s' "$found"
}

# Calls "$@" again as long as its exit status says so: at most $1 more times, and never after SHORT_TRIES tries in a row
# that lived for less than SHORT_S seconds.
STOPPED=""    # the signal by which a person or a scheduler stopped the script
again() {
    local restarts="$1" short=0 status began
    shift
    while :; do
        began=$SECONDS status=0
        "$@" || status=$?
        ((DRY_RUN)) && return 0
        try_again "$status" && [[ -z "$STOPPED" ]] || return "$status"
        if ((SECONDS - began < SHORT_S)); then short=$((short + 1)); else short=0; fi
        if ((short >= SHORT_TRIES)); then
            say "exit status $status, $short times in a row within $SHORT_S s: not started again"
            return "$status"
        fi
        if ((restarts-- <= 0)); then
            say "exit status $status: the last of the tries (--restarts)"
            return "$status"
        fi
        say "exit status $status: started again, from the last checkpoint"
        sleep "${PAUSE_S:-$((1 << short))}"
    done
}
