#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What every host of a pod runs, whoever starts it: train, and say by the exit code whether to start it again.
#   launch/run.sh CONFIG WORKDIR [field of the config ...]
# 0: all stages are done. 2: a person has to mend something, or it failed $FEW times without a new checkpoint, or
# another host ended with 2; no launcher tries that again. WORKDIR: a folder that all hosts see, or gs://BUCKET/RUN. 75: stopped and saved, or a host did not come; start the same
# again. Anything else: it failed, and the same command goes on from the newest checkpoint that can be trusted.
set -uo pipefail
cd "$(dirname "$0")/.."
config="$1" workdir="$2"
shift 2
[ -x .venv/bin/lionjax ] && PATH="$PWD/.venv/bin:$PATH"
source launch/exit_codes.sh
source launch/flags.sh
use_flags ${FLAGS:-} || exit 2
noted="$(mistakes "$workdir")"

# A scheduler's SIGTERM must reach the program, which then saves; bash alone would end and leave it behind.
lionjax train "$config" --workdir "$workdir" "$@" &
program=$!
trap 'kill -TERM "$program" 2>/dev/null' TERM INT
wait "$program"; code=$?
while kill -0 "$program" 2>/dev/null; do wait "$program"; code=$?; done

if [ "$code" -eq 0 ]; then
    is_done "$workdir" && exit 0
    exit 75
fi
if [ "$code" -ne 2 ] && [ "$(mistakes "$workdir")" != "$noted" ]; then
    echo "ended with $code, because another host of this run ended with 2" >&2
    exit 2
fi
case "$(what_next "$code")" in
    stop) note_mistake "$workdir" ;;
    few)
        # This host's number, which stays the same when other machines take over.
        who="${MEGASCALE_SLICE_ID:-0}_${SLURM_PROCID:-${SKYPILOT_NODE_RANK:-${JOB_COMPLETION_INDEX:-$(hostname)}}}"
        if ! may_fail_again "$workdir" "$who" "$code"; then
            echo "ended with $code again and again without a new checkpoint; it is not tried again" >&2
            note_mistake "$workdir"
            exit 2
        fi
        ;;
esac
exit "$code"
