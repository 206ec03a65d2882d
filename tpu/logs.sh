#!/usr/bin/env bash
# Follows the log of a host, by default the first (0).
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE

on_host "${1:-0}" 'tail --lines 50 --follow=name --retry ~/prelm.log'
