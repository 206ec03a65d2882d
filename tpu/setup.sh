#!/usr/bin/env bash
# Installs prelm on every host and copies the data there. Run it again to update both.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE REPOSITORY REVISION

on_host all "set -e
[ -d prelm_jax ] || git clone --quiet ${REPOSITORY@Q} prelm_jax
cd prelm_jax
git fetch --quiet origin ${REVISION@Q}
git checkout --quiet FETCH_HEAD
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'"

# gcloud compares checksums (CRC32C) of the copies.
[[ -z $DATA ]] || on_host all "mkdir -p data && gcloud storage rsync --recursive ${DATA@Q} data"
