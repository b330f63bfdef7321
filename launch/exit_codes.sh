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

# progress WORKDIR: prints text that changes with each checkpoint that is complete.
progress() { (cd "$1" 2>/dev/null && ls base checkpoints 2>/dev/null) | grep -v tmp | cksum; }

# may_fail_again WORKDIR WHO CODE: counts a failure of WHO in WORKDIR/launch; false for the last of the FEW without a
# new checkpoint. An abort (134) counts a third: JAX ends a process in this way when another host is taken away.
may_fail_again() {
    local file="$1/launch/failures_$2" at now count=0 weight=3
    now="$(progress "$1")"
    [ "$3" -eq 134 ] && weight=1
    [ -f "$file" ] && { read -r at; read -r count; } <"$file" && [ "$at" = "$now" ] || count=0
    count=$((count + weight))
    mkdir -p "$1/launch" && printf '%s\n%s\n' "$now" "$count" >"$file"
    [ "$count" -lt $((3 * FEW)) ] || { rm -f "$file"; return 1; } # once it is mended, it is counted afresh
}

# mistakes WORKDIR: prints what note_mistake wrote, so that each host sees whether another has ended with 2.
mistakes() { ls "$1/launch" >/dev/null 2>&1; cat "$1/launch/mistakes" 2>/dev/null; true; }
note_mistake() { mkdir -p "$1/launch" && echo "$(date -u +%FT%TZ) $(hostname) $$" >>"$1/launch/mistakes"; }
