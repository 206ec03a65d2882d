#!/usr/bin/env bash
# Starts the training on every host, in the background; the same command resumes it.
# Arguments are options of `prelm pretrain`: tpu/launch.sh --corpus '../data/wiki/*.txt.xz'
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE EXPERIMENT WORKDIR

# Tells every host the number of hosts; it trains with all of them or not at all.
found=$(tpus tpu-vm describe "$TPU_NAME" --flatten 'networkEndpoints[]' --format 'value(networkEndpoints.ipAddress)')
if $DRY_RUN; then
  echo "$found"
  found=FIRST-HOST
fi
mapfile -t addresses <<<"$found"
on_host all "prelm_jax/tpu/host.sh start ${addresses[0]}:$PORT ${#addresses[@]} \
${EXPERIMENT@Q} --workdir ${WORKDIR@Q} ${*@Q}"
