#!/usr/bin/env bash
# Requests the slice and waits until it is ready.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE ACCELERATOR_TYPE

case $ACCELERATOR_TYPE in
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
options=(--accelerator-type "$ACCELERATOR_TYPE")
[[ $PROVISIONING != *spot ]] || options+=(--spot)

queue_state() {
  tpus queued-resources describe "$TPU_NAME" --format 'value(state.state)'
}

case $PROVISIONING in
  on-demand | spot)
    tpus tpu-vm create "$TPU_NAME" "${options[@]}" --version "$runtime"
    ;;
  queued | queued-spot)
    tpus queued-resources create "$TPU_NAME" --node-id "$TPU_NAME" "${options[@]}" --runtime-version "$runtime"
    $DRY_RUN || until [[ $(queue_state) == ACTIVE ]]; do
      [[ $(queue_state) != @(FAILED|SUSPENDED) ]] || exit 1
      sleep "$POLL"
    done
    ;;
  *)
    echo "create.sh: PROVISIONING is on-demand, spot, queued or queued-spot, not $PROVISIONING" >&2
    exit 1
    ;;
esac
