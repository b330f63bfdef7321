#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What every host of a pod runs, whoever starts it: train, and say by the exit code whether that is the end.
#   launch/run.sh CONFIG WORKDIR [field of the config ...]
# 0: all stages are done. 2: a mistake in the config, before anything was learned; trying again does not mend it. 75:
# stopped in good order and saved, or a host did not come; start the same again. Anything else: it failed, and the same
# command goes on from the newest checkpoint that can be trusted.
set -uo pipefail
cd "$(dirname "$0")/.."
config="$1" workdir="$2"
shift 2
[ -x .venv/bin/lionjax ] && PATH="$PWD/.venv/bin:$PATH"
source launch/flags.sh
use_flags ${FLAGS:-} || exit 2

# A scheduler's SIGTERM must reach the program, which then saves; bash alone would end and leave it behind.
lionjax train "$config" --workdir "$workdir" "$@" &
program=$!
trap 'kill -TERM "$program" 2>/dev/null' TERM INT
wait "$program"; code=$?
while kill -0 "$program" 2>/dev/null; do wait "$program"; code=$?; done
if [ "$code" -eq 2 ] && compgen -G "$workdir/base/*" >/dev/null; then exit 75; fi
[ "$code" -eq 0 ] || exit "$code"
compgen -G "$workdir/base/*_final" >/dev/null && exit 0
exit 75
