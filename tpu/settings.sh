# Shared by the scripts of this folder. Set the variables in the environment, or change them here.
# shellcheck shell=bash

set -euo pipefail

# The slice and its zone. ACCELERATOR_TYPE as Google names it: v5litepod-16, v6e-8, v4-32 and v5p-32 (both 16 chips).
: "${TPU_NAME:=}" "${ZONE:=}" "${ACCELERATOR_TYPE:=}"
# How to request it: on-demand, spot, queued or queued-spot.
: "${PROVISIONING:=queued-spot}"
# The experiment and its work directory: in a bucket, because a preempted slice loses its disks.
: "${EXPERIMENT:=}" "${WORKDIR:=}"
# The code that the hosts install, and a folder in a bucket that is copied to ~/data on each host: the corpus, and in
# cache/ its prepared form. DATA may be empty.
: "${REPOSITORY:=}" "${REVISION:=main}" "${DATA:=}"
# The port of the first host; seconds between two looks at the state of the slice.
: "${PORT:=8476}" "${POLL:=60}"

: "${DRY_RUN:=false}"
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=true
  shift
fi
export DRY_RUN

# Exits if one of these variables is empty, and names it.
need() {
  local name missing=()
  for name in "$@"; do
    [[ -n ${!name} ]] || missing+=("$name")
  done
  if ((${#missing[@]})); then
    echo "$(basename "$0"): set ${missing[*]} (see tpu/settings.sh)" >&2
    exit 1
  fi
}

# gcloud compute tpus, in the zone; a dry run prints it instead.
tpus() {
  local command=(gcloud compute tpus "$@" --zone "$ZONE")
  if $DRY_RUN; then
    printf '%q ' "${command[@]}" && echo
  else
    "${command[@]}"
  fi
}

# Runs a line of shell on one host of the slice, by its number, or on `all`.
on_host() {
  tpus tpu-vm ssh "$TPU_NAME" --worker "$1" --command "$2"
}
