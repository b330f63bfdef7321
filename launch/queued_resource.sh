#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole story on a Cloud TPU slice, from a laptop that has gcloud: ask for chips, wait for them, install on every
# host, train on all of them, and begin again whenever they are taken away, until the last stage is done.
#
#   lionjax plan configs/nextchat_7b.py --topology v5e-64      # before: does it fit?
#   NAME=nextchat ZONE=us-west4-a ACCELERATOR=v5litepod-64 NFS=10.0.0.2:/runs \
#       launch/queued_resource.sh configs/nextchat_7b.py [field of the config ...]
#
# It may be stopped and started at any time: what is there already is used. `SPOT=no` asks for chips that stay.
# SLICES=2 asks for two slices, which meet over the network; give `--mesh.slices 2` to the config then.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG="${1:?give a config, such as configs/nextchat_7b.py}"
shift
NAME="${NAME:?set NAME: what the slice and the run are called}"
ZONE="${ZONE:?set ZONE, such as us-west4-a}"
ACCELERATOR="${ACCELERATOR:?set ACCELERATOR, such as v5litepod-64 or v5p-512}"
# A file system that all hosts share holds configs' weights and data, and every checkpoint: a Filestore or Lustre
# export. With BUCKET=gs://BUCKET/runs the checkpoints go there, and NFS is needed only for paths below weights/ and
# data/ in the config (which may be gs:// names too). A bucket mounted as a folder cannot hold runs.
BUCKET="${BUCKET:-}"
[ -n "$BUCKET" ] || NFS="${NFS:?set NFS, such as 10.0.0.2:/runs, or BUCKET, such as gs://mine/runs}"
NFS="${NFS:-}"
RUNS="${BUCKET:-/mnt/runs}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" # v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4
SPOT="${SPOT:-yes}"
SLICES="${SLICES:-1}"
FLAGS="${FLAGS:-}" # names of launch/flags.sh
PAUSE="${PAUSE:-60}" # seconds between looks
TRIES="${TRIES:-100}" # how often it may begin again
source launch/exit_codes.sh

say() { echo "$(date -u +%H:%M:%S) $*" >&2; }
tpus() { gcloud compute tpus "$@" --zone="$ZONE" --quiet; }

# One slice is a node; several are numbered nodes.
NODES=("$NAME")
if [ "$SLICES" -gt 1 ]; then
    NODES=()
    for ((n = 0; n < SLICES; n++)); do NODES+=("$NAME-$n"); done
fi

state() { tpus queued-resources describe "$NAME" --format="value(state.state)" 2>/dev/null || echo NONE; }

ask() {
    local how=(--node-id="$NAME")
    [ "$SLICES" -gt 1 ] && how=(--node-count="$SLICES" --node-prefix="$NAME")
    [ "$SPOT" = yes ] && how+=(--spot)
    tpus queued-resources create "$NAME" "${how[@]}" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME"
}

wait_for_chips() {
    local now=""
    while now="$(state)"; do
        case "$now" in
            ACTIVE) return ;;
            NONE) say "asking for $ACCELERATOR"; ask ;;
            SUSPENDED | FAILED)
                # Taken away, or never to come: such a request can only be dropped and made again.
                say "$now; asking anew"
                tpus queued-resources delete "$NAME" --force
                ;;
            *) say "$now" ;;
        esac
        sleep "$PAUSE"
    done
}

on() { # on WORKERS COMMAND: on each slice; 2 decides before all other codes
    local node pids=() code=0
    for node in "${NODES[@]}"; do
        tpus tpu-vm ssh "$node" --worker="$1" --command="$2" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || { local one=$?; [ "$code" -eq 2 ] || code=$one; }; done
    return "$code"
}

install() { # every host may be new; what stands already is left alone
    local pack node
    pack="$(mktemp -d)/lionjax.tar.gz"
    # Weights and data lie on NFS; what this machine has of them stays here.
    tar czf "$pack" --exclude-vcs --exclude='.venv*' --exclude=./runs --exclude=./weights --exclude=./data \
        --exclude=__pycache__ .
    for node in "${NODES[@]}"; do tpus tpu-vm scp "$pack" "$node:lionjax.tar.gz" --worker=all; done
    local mount=""
    [ -z "$NFS" ] || mount="mountpoint -q /mnt/runs || sudo mount -t nfs $NFS /mnt/runs"
    on all "set -e; sudo mkdir -p /mnt/runs; $mount
        mkdir -p lionjax; tar xzf lionjax.tar.gz -C lionjax; cd lionjax; ln -sfn /mnt/runs/weights weights
        ln -sfn /mnt/runs/data data
        python3.11 -m venv --help >/dev/null 2>&1 || { sudo apt-get -q update; sudo apt-get -qy install python3.11-venv; }
        [ -d .venv ] || python3.11 -m venv .venv
        .venv/bin/pip install -q -c lock/py311.txt -e '.[data,tpu]'"
}

# What has a space in it must come through two shells as one word.
FIELDS="$(printf ' %q' "$@")"
[ $# -gt 0 ] || FIELDS=""
RUN="cd lionjax && FLAGS='$FLAGS' launch/run.sh $CONFIG $RUNS/$NAME$FIELDS"

failures=0 # in a row, on chips that are still there; run.sh counts those without a new checkpoint, here are all others
failed() { # failed CODE: ends the script for the last of the few failures that may be tried again
    [ "$(state)" = ACTIVE ] || return 0
    failures=$((failures + 1))
    [ "$failures" -lt "$FEW" ] || { say "failed $failures times in a row, the last time with $1"; exit "$1"; }
}

for ((try = 1; try <= TRIES; try++)); do
    wait_for_chips
    say "try $try: installing on every host"
    install || { code=$?; say "installing failed"; failed "$code"; sleep "$PAUSE"; continue; }
    say "training on all hosts of ${NODES[*]}"
    began=$SECONDS code=0
    # A TPU VM tells JAX who the other hosts are. All of them must run this, or none gets past the start.
    on all "$RUN" || code=$?
    say "ended with $code"
    [ $((SECONDS - began)) -lt 3600 ] || failures=0
    case "$(what_next "$code")" in
        done)
            say "all stages are done: ${BUCKET:-$NFS} holds $NAME"
            tpus queued-resources delete "$NAME" --force
            exit 0
            ;;
        stop) say "that is a mistake to be mended (the sentence above says which); trying again does not mend it"; exit 2 ;;
        again) failures=0 ;;
        few) failed "$code" ;;
    esac
    sleep "$PAUSE"
done
say "still not done after $TRIES tries"
exit 1
