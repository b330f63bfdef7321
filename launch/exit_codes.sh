# SPDX-License-Identifier: Apache-2.0
# What an exit code asks of a launcher (the table in docs/faults.md), to be sourced: `source launch/exit_codes.sh`.

FEW="${FEW:-3}" # how often a run may fail without a new checkpoint in between

# what_next CODE: prints done, stop (a person has to mend something), again, or few (try again, a few times).
what_next() {
    case "$1" in
        0) echo done ;;
        2) echo stop ;;
        75 | 130 | 137 | 143) echo again ;; # saved and not done, or a signal ended it (2, 9 and 15)
        *) echo few ;;
    esac
}

# in_bucket VERB WORKDIR [NAME]: launch/bucket_marks.py, with the Python of lionjax.
in_bucket() {
    local python=.venv/bin/python
    [ -x "$python" ] || python="$(dirname "$(command -v lionjax)")/python"
    "$python" launch/bucket_marks.py "$@"
}

# mark get|put|delete WORKDIR NAME: a file of WORKDIR/launch, which may be in a bucket; put reads stdin.
mark() {
    case "$2" in gs://*) in_bucket "$@"; return ;; esac
    case "$1" in
        get) ls "$2/launch" >/dev/null 2>&1; cat "$2/launch/$3" 2>/dev/null; true ;;
        put) mkdir -p "$2/launch" && cat >"$2/launch/$3" ;;
        delete) rm -f "$2/launch/$3" ;;
    esac
}

# is_done WORKDIR: whether all stages are done.
is_done() {
    case "$1" in gs://*) in_bucket done "$1" ;; *) compgen -G "$1/base/*_final" >/dev/null ;; esac
}

# progress WORKDIR: prints text that changes with each checkpoint that is complete.
progress() {
    case "$1" in
        gs://*) in_bucket progress "$1" | cksum ;;
        *) (cd "$1" 2>/dev/null && ls base checkpoints 2>/dev/null) | grep -v tmp | cksum ;;
    esac
}

# may_fail_again WORKDIR WHO CODE: counts a failure of WHO in WORKDIR/launch; false for the last of the FEW without a
# new checkpoint. An abort (134) counts a third: JAX ends a process in this way when another host is taken away.
may_fail_again() {
    local name="failures_$2" at="" now count=0 weight=3
    now="$(progress "$1")"
    [ "$3" -eq 134 ] && weight=1
    { read -r at; read -r count; } < <(mark get "$1" "$name") && [ "$at" = "$now" ] || count=0
    count=$((count + weight))
    printf '%s\n%s\n' "$now" "$count" | mark put "$1" "$name"
    [ "$count" -lt $((3 * FEW)) ] || { mark delete "$1" "$name"; return 1; } # once it is mended, it is counted afresh
}

# mistakes WORKDIR: prints what note_mistake wrote, so that each host sees whether another has ended with 2.
mistakes() { mark get "$1" mistakes; }
note_mistake() {
    local line
    line="$(date -u +%FT%TZ) $(hostname) $$"
    case "$1" in
        gs://*) { mistakes "$1"; echo "$line"; } | mark put "$1" mistakes ;;
        *) mkdir -p "$1/launch" && echo "$line" >>"$1/launch/mistakes" ;;
    esac
}
