#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one host or a pod, driven from this machine with gcloud. gcloud must
# be logged in with its project set; for a pod, add its key to the agent first:
# ssh-add ~/.ssh/google_compute_engine
#
#   ZONE=us-central2-b TYPE=v4-32 \
#     scripts/launch_tpu_pod.sh cifar10 --workdir gs://BUCKET/cifar10 [--options]
#
# Arguments are those of `ddpm-jax train`; put a config of your own into configs/. Creates the slice
# if it is missing, installs this checkout on all its workers and trains on all of them. If the
# slice is preempted, it creates a new one and runs the same command there, which resumes from the
# last checkpoint, until training is done. Ctrl-C leaves the slice as it is; run the same command to
# continue with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=${NAME:-ddpm-jax}                    # name of the slice
ZONE=${ZONE:-us-central2-b}               # zone of the slice
TYPE=${TYPE:-v4-32}                       # its chips: --accelerator-type
VERSION=${VERSION:-tpu-ubuntu2204-base}   # its system: --version
SPOT=${SPOT:-1}                           # 0: no preemption, but costs more
CREATE=${CREATE:-}                        # more creation flags: "--network=N --service-account=A"
SETUP=${SETUP:-true}                      # command run on every worker first, e.g. to fetch data
DELETE=${DELETE:-0}                       # 1: delete the slice when training is done
RETRIES=${RETRIES:-10}                    # give up after this many failures in a row on one slice
PAUSE=${PAUSE:-30}                        # seconds to wait before checking or trying again
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

case " $*" in
  *" --workdir gs://"* | *" --workdir=gs://"*) ;;
  *)
    echo "$0: name a config and --workdir gs://BUCKET/RUN: a preempted slice loses its disks" >&2
    exit 2
    ;;
esac

say() { echo "$(date +%H:%M:%S) $NAME: $*" >&2; }

tpu() { # tpu VERB [FLAGS]: a gcloud command for the slice
  gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"
}

state() { # READY, CREATING, PREEMPTED, ...; empty if there is no such slice
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

install() { # The base images' Python is older than 3.11, so uv installs a newer one.
  tar -czf "$package" --exclude=__pycache__ setup.py pyproject.toml README.md ddpm_jax configs &&
    gcloud compute tpus tpu-vm scp "$package" "$NAME:ddpm-jax.tgz" --zone="$ZONE" --worker=all \
      --batch-size=all &&
    on_all_workers "set -e; mkdir -p ddpm-jax; tar -xzf ddpm-jax.tgz -C ddpm-jax; cd ddpm-jax
      [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
      [ -x .venv/bin/python ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
      ~/.local/bin/uv pip install --quiet --reinstall-package ddpm-jax '.[tpu,gcs]'
      cd; $SETUP"
}

# First stops training that an interrupted connection left running, and waits until it has saved.
# Training exits with 0 after a SIGTERM too, so the trap makes that exit code 75.
train() {
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
      sleep "$PAUSE" # The state shows a preemption only after a while.
      if [ "$(state)" != READY ]; then
        say "preempted; the run will resume from its last checkpoint"
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
      create || sleep "$PAUSE" # There may be no free slice: try until there is.
      ;;
    PREEMPTED | TERMINATED | STOPPED)
      say "deleting the preempted slice"
      tpu delete || sleep "$PAUSE"
      ;;
    *) sleep "$PAUSE" ;; # The state is about to change.
  esac
done
if [ "$DELETE" = 1 ]; then
  say "training is done; deleting the slice"
  tpu delete
else
  say "training is done; the slice is still there and costs money; to delete it:" \
    "gcloud compute tpus tpu-vm delete $NAME --zone=$ZONE"
fi
