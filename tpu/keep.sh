#!/usr/bin/env bash
# Trains to the end despite preemptions: creates the slice, sets it up and launches, again after each preemption, and
# deletes the slice at the end. Arguments as for launch.sh; --dry-run shows one round.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE ACCELERATOR_TYPE EXPERIMENT WORKDIR REPOSITORY

here=$(dirname "$0")
while true; do
  # Asks again if the query fails, so that a network failure deletes nothing.
  if ! state=$(tpus tpu-vm list --filter "name ~ /$TPU_NAME\$" --format 'value(state)'); then
    sleep "$POLL" && continue
  fi
  ! $DRY_RUN || state=
  case $state in
    READY) ;;
    '' | PREEMPTED | TERMINATED)
      "$here/delete.sh" 2>/dev/null || true # The remains of a preempted slice.
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
      echo "keep.sh: fix this and run keep.sh again, or tpu/delete.sh: the slice costs money until it is deleted" >&2
      exit 1
      ;;
    *) "$here/setup.sh" && "$here/launch.sh" "$@" || true ;;
  esac
  ! $DRY_RUN || exit 0
  sleep "$POLL"
done
