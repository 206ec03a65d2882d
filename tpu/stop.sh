#!/usr/bin/env bash
# Makes the training save and stop: a signal to one host stops all of them after the same step.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE

on_host 0 'prelm_jax/tpu/host.sh stop'
