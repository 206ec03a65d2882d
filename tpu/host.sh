#!/usr/bin/env bash
# The other scripts run this on a host. The log is ~/prelm.log.
#   start ADDRESS:PORT HOSTS ARGUMENTS…   trains in the background, as one of HOSTS processes
#   stop                                  saves, stops, and waits until that is done
#   status                                prints `running`, the exit code of the last training, or nothing
set -euo pipefail
cd "$(dirname "$0")/.."

running() {
  [[ -e ~/prelm.pid ]] && kill -0 "$(cat ~/prelm.pid)" 2>/dev/null
}

case $1 in
  start)
    if running; then
      echo "host.sh: a training is running here" >&2
      exit 1
    fi
    JAX_PROCESS_ID=$(curl --silent --fail --header 'Metadata-Flavor: Google' \
      http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
    export JAX_PROCESS_ID JAX_COORDINATOR_ADDRESS=$2 JAX_NUM_PROCESSES=$3 PRELM_CACHE=~/data/cache
    rm -f ~/prelm.exit
    setsid tpu/host.sh train "${@:4}" >~/prelm.log 2>&1 </dev/null &
    echo $! >~/prelm.pid
    ;;
  train)
    code=0
    .venv/bin/prelm pretrain "${@:2}" || code=$?
    echo $code >~/prelm.exit
    ;;
  stop)
    if running; then
      pkill -TERM --parent "$(cat ~/prelm.pid)"
      tail --pid "$(cat ~/prelm.pid)" --lines 1 --follow ~/prelm.log
    fi
    ;;
  status)
    if running; then echo running; else cat ~/prelm.exit 2>/dev/null || true; fi
    ;;
esac
