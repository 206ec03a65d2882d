# What the scripts of this folder share. Set the variables in the environment, or change them here.
# shellcheck shell=bash

set -euo pipefail

# Which slice, and where. ACCELERATOR_TYPE in Google's words: v5litepod-16, v6e-8, v4-32 and v5p-32 (both 16 chips).
: "${TPU_NAME:=}" "${ZONE:=}" "${ACCELERATOR_TYPE:=}"
# How to get it: on-demand, spot, queued or queued-spot.
: "${PROVISIONING:=queued-spot}"
# What to train, and where: in a bucket, for a slice that is taken away takes its disks along.
: "${EXPERIMENT:=}" "${WORKDIR:=}"
# The code that the hosts install, and a folder of a bucket that is copied to each host's ~/data: the corpus, and in
# cache/ what a first run made of it elsewhere. DATA may stay empty.
: "${REPOSITORY:=}" "${REVISION:=main}" "${DATA:=}"
# The port on which the hosts meet; how often to look what has become of a slice, in seconds.
: "${PORT:=8476}" "${POLL:=60}"

: "${DRY_RUN:=false}"
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=true
  shift
fi
export DRY_RUN

# Refuses to go on without these variables, by name.
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

# A line of shell on one host of the slice, by its number, or on `all`.
on_host() {
  tpus tpu-vm ssh "$TPU_NAME" --worker "$1" --command "$2"
}
