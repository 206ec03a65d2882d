#!/usr/bin/env bash
# Starts the training on every host, in the background; the same command again goes on where it stopped.
# Arguments are options of `prelm pretrain`: tpu/launch.sh --corpus '../data/wiki/*.txt.xz'
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE EXPERIMENT WORKDIR

# Every host is told how many there are, and trains with all of them or not at all.
found=$(tpus tpu-vm describe "$TPU_NAME" --flatten 'networkEndpoints[]' --format 'value(networkEndpoints.ipAddress)')
if $DRY_RUN; then
  echo "$found"
  found=FIRST-HOST
fi
mapfile -t addresses <<<"$found"
on_host all "prelm_jax/tpu/host.sh start ${addresses[0]}:$PORT ${#addresses[@]} \
${EXPERIMENT@Q} --workdir ${WORKDIR@Q} ${*@Q}"
