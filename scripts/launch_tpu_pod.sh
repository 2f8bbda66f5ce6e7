#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one host or a pod, driven from here with gcloud (logged in, its project set, and for a
# pod its key in the agent: ssh-add ~/.ssh/google_compute_engine):
#
#   ZONE=us-central2-b TYPE=v4-32 scripts/launch_tpu_pod.sh cifar10 --workdir gs://BUCKET/cifar10 [--options]
#
# Arguments are those of `ddpm-jax train`; a config of your own lies in configs/. Makes the slice if it is missing,
# installs this checkout on all its workers and trains on all of them. When the slice is taken away it makes a new
# one and runs the same command there, which goes on from the last checkpoint, until training has ended. Ctrl-C
# leaves the slice as it is; the same command takes it over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=${NAME:-ddpm-jax}                    # of the slice
ZONE=${ZONE:-us-central2-b}               # where it is
TYPE=${TYPE:-v4-32}                       # its chips: --accelerator-type
VERSION=${VERSION:-tpu-ubuntu2204-base}   # its system: --version
SPOT=${SPOT:-1}                           # 0 for a slice that is not taken away, and costs more
CREATE=${CREATE:-}                        # more flags to create it with: "--network=N --service-account=A"
SETUP=${SETUP:-true}                      # a command that every worker runs before training: to fetch data, say
DELETE=${DELETE:-0}                       # 1 deletes the slice when training has ended
RETRIES=${RETRIES:-10}                    # failures in a row, on a slice that is there, before it gives up
PAUSE=${PAUSE:-30}                        # seconds before another look or try
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

case " $*" in
  *" --workdir gs://"* | *" --workdir=gs://"*) ;;
  *)
    echo "$0: name a config and --workdir gs://BUCKET/RUN: a slice that is taken away takes its disks along" >&2
    exit 2
    ;;
esac

say() { echo "$(date +%H:%M:%S) $NAME: $*" >&2; }

tpu() { # tpu VERB [FLAGS]: a command about the slice
  gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

state() { # READY, CREATING, PREEMPTED, ...; nothing where there is no such slice
  tpu describe --format='value(state)' 2>/dev/null || true
}

create() {
  local flags
  read -ra flags <<<"$CREATE"
  [ "$SPOT" = 0 ] || flags+=(--spot)
  tpu create --accelerator-type="$TYPE" --version="$VERSION" ${flags[@]+"${flags[@]}"}
}

on_all_workers() { # on_all_workers COMMAND; fails if it fails on any
  tpu ssh --worker=all --batch-size=all --command="$1"
}

install() { # The base images' Python is older than 3.11, so uv brings one.
  tar -czf "$package" --exclude=__pycache__ setup.py pyproject.toml README.md ddpm_jax configs &&
    gcloud compute tpus tpu-vm scp "$package" "$NAME:ddpm-jax.tgz" --zone="$ZONE" --worker=all --batch-size=all &&
    on_all_workers "set -e; mkdir -p ddpm-jax; tar -xzf ddpm-jax.tgz -C ddpm-jax; cd ddpm-jax
      [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
      [ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
      ~/.local/bin/uv pip install --quiet --reinstall-package ddpm-jax '.[tpu,gcs]'
      cd; $SETUP"
}

train() { # What an earlier, cut connection left running saves and ends first. After a SIGTERM training exits with 0 too.
  on_all_workers "pkill -x ddpm-jax; while pgrep -x ddpm-jax >/dev/null; do sleep 1; done
    trap 'exit 75' TERM; ddpm-jax/.venv/bin/ddpm-jax train $(printf '%q ' "$@")"
}

package=$(mktemp)
trap 'rm -f "$package"' EXIT
runs=0 failures=0
while true; do
  case $(state) in
    READY)
      say "installing and training, start $((++runs))"
      code=0
      { install && train "$@"; } || code=$?
      sleep "$PAUSE" # A slice that is taken away is known to be a little later.
      if [ "$(state)" != READY ]; then
        say "taken away; the run goes on from its last checkpoint"
        failures=0
      elif [ "$code" = 0 ]; then
        break
      elif [ $((++failures)) = "$RETRIES" ] || { [ "$code" = 2 ] && [ "$runs" = 1 ]; }; then
        say "failed with exit code $code; the slice is still there"
        exit "$code"
      else
        say "failed with exit code $code, failure $failures of $RETRIES"
      fi
      ;;
    "")
      say "creating a $TYPE in $ZONE"
      create || sleep "$PAUSE" # None may be free: try until one is.
      ;;
    PREEMPTED | TERMINATED | STOPPED)
      say "deleting what is left of it"
      tpu delete || sleep "$PAUSE"
      ;;
    *) sleep "$PAUSE" ;; # On its way to another state.
  esac
done
if [ "$DELETE" = 1 ]; then
  say "training has ended; deleting the slice"
  tpu delete
else
  say "training has ended; the slice is still there, and paid for: gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE"
fi
