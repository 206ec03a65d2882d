#!/usr/bin/env bash
# Gives the slice back, and with it everything that is not in a bucket.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE

case $PROVISIONING in
  queued*) tpus queued-resources delete "$TPU_NAME" --force --quiet ;;
  *) tpus tpu-vm delete "$TPU_NAME" --quiet ;;
esac
