# Sourced by the set-up scripts: how they report progress and failures. Everything goes to stderr, so that stdout stays
# free for the one value that a script hands to its caller.

KEEPSIGHT_SETUP_STARTED="${KEEPSIGHT_SETUP_STARTED:-$(date +%s)}"
export KEEPSIGHT_SETUP_STARTED # scripts called by scripts/setup count from the same moment

keepsight_cache="${KEEPSIGHT_CACHE:-${XDG_CACHE_HOME:-${HOME:?is not set: set it, or set KEEPSIGHT_CACHE}/.cache}/keepsight}"

# step TEXT: one line of progress, with the seconds since the set-up began.
step() { printf '[%4d s] %s\n' "$(($(date +%s) - KEEPSIGHT_SETUP_STARTED))" "$1" >&2; }

# die TEXT [FIX]: what happened, and what to do about it.
die() {
    printf '\nSet-up stopped: %s\n' "$1" >&2
    if [ $# -gt 1 ]; then printf '%s\n' "$2" >&2; fi
    exit 1
}

# every_tenth LABEL DONE TOTAL: a line each time another tenth of TOTAL is done.
reported_tenths=0
every_tenth() {
    local tenths=$(($2 * 10 / $3))
    if [ "$tenths" -gt "$reported_tenths" ]; then
        reported_tenths=$tenths
        step "  $1: ${tenths}0 %"
    fi
}

# show_end_of LOG: the last lines of a log whose command failed, and where the rest lies.
show_end_of() {
    printf '\n' >&2
    tail -n 25 "$1" | cut -c1-300 >&2
    printf '\nThe full log: %s\n' "$1" >&2
}
