#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole story on a laptop: from drawn pictures to a page of answers, with no accelerator and no download.
# `make demo` sets up .venv and runs this. Each line is a command to try by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
PATH="$PWD/.venv/bin:$PATH"

# Where everything goes. A run that was stopped goes on where it stood; delete the folder to start over.
RUN="${1:-runs/demo}"

# Three stages over frozen tiny backbones: the Q-Former learns to describe whole pictures, the aggregator learns
# to point, then both work together while the routers learn whom to listen to for which task. At last a short one
# for masks, from a tenth of them.
lionjax train configs/tiny_lionjax.py --workdir "$RUN"

# The same weights under the names of the original PyTorch code, read back and compared bit by bit.
rm -rf "$RUN/torch"
lionjax convert "$RUN" "$RUN/torch" --to torch

# A question and a search, on a picture that it never saw; box and mask are drawn into the second one's copy.
PICTURES=("$RUN"/evaluation/pictures/*.png)
PICTURE="${PICTURES[0]}"
lionjax generate "$RUN" --image "$PICTURE" --prompt "Describe the image in one short sentence."
lionjax generate "$RUN" --image "$PICTURE" --prompt "Where is the orange ring?" --out "$RUN/where.png"

# Curves, tables against baselines, and held-out pictures with the answers given: report.html, report.json.
lionjax report "$RUN"

echo "Open $RUN/report.html"
