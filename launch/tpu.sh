#!/usr/bin/env bash
# Runs on every worker of a Cloud TPU VM slice; launch/tpu.md has the command that starts it there.
set -uo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-3}
PORT=${PORT:-8476}

attribute() {
  curl -fsS -H 'Metadata-Flavor: Google' "${METADATA:-http://metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

# worker-network-endpoints: id:port:address of each worker, separated by commas
endpoints=$(attribute worker-network-endpoints) || exit 1
index=$(attribute agent-worker-number) || exit 1
IFS=, read -ra workers <<<"$endpoints"
export JAX_NUM_PROCESSES=${#workers[@]} JAX_PROCESS_ID=$index

for attempt in $(seq 0 "$RESTARTS"); do
  export JAX_COORDINATOR_ADDRESS="${workers[0]##*:}:$((PORT + attempt))"
  "$PYTHON" -m experiments.train "$@"
  code=$?
  [ "$code" -eq 0 ] && exit 0
  [ "$code" -eq 143 ] && exit 143 # preempted, and saved: start it again on the next slice
  echo "launch: worker $index ended with code $code; attempt $((attempt + 1)) of $((RESTARTS + 1))"
done
exit "$code"
