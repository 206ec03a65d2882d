#!/usr/bin/env bash
# Tells the training to save and stop: when one host is told, all stop after the same step.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE

on_host 0 'prelm_jax/tpu/host.sh stop'
