#!/usr/bin/env bash
# Trains to the end, whatever is taken away meanwhile: creates the slice, sets it up, launches, and does so again after
# a preemption. At the end it gives the slice back. Arguments as for launch.sh; --dry-run shows one round.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE ACCELERATOR_TYPE EXPERIMENT WORKDIR REPOSITORY

here=$(dirname "$0")
while true; do
  # A question that fails is asked again: nothing is deleted for a network that is down.
  if ! state=$(tpus tpu-vm list --filter "name ~ /$TPU_NAME\$" --format 'value(state)'); then
    sleep "$POLL" && continue
  fi
  ! $DRY_RUN || state=
  case $state in
    READY) ;;
    '' | PREEMPTED | TERMINATED)
      "$here/delete.sh" 2>/dev/null || true # What is left of a slice that was taken away.
      "$here/create.sh" || { sleep "$POLL" && continue; }
      ;;
    *) sleep "$POLL" && continue ;;
  esac
  if ! status=$(on_host 0 'prelm_jax/tpu/host.sh status || echo new'); then
    sleep "$POLL" && continue
  fi
  case $status in
    running) ;;
    0)
      echo "keep.sh: the training is done, its work directory is $WORKDIR"
      exec "$here/delete.sh"
      ;;
    1)
      on_host 0 'tail --lines 1 ~/prelm.log' >&2
      echo "keep.sh: mend this and run keep.sh again, or tpu/delete.sh: the slice costs money as long as it is there" >&2
      exit 1
      ;;
    *) "$here/setup.sh" && "$here/launch.sh" "$@" || true ;;
  esac
  ! $DRY_RUN || exit 0
  sleep "$POLL"
done
