#!/usr/bin/env bash
# Follows the log of a host: the first one's, unless a number is given.
. "$(dirname "$0")/settings.sh"
need TPU_NAME ZONE

on_host "${1:-0}" 'tail --lines 50 --follow=name --retry ~/prelm.log'
