#!/usr/bin/env bash
# Deletes the slice, with everything that is not in a bucket.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE

case $PROVISIONING in
  queued*) tpus queued-resources delete "$TPU_NAME" --force --quiet ;;
  *) tpus tpu-vm delete "$TPU_NAME" --quiet ;;
esac
