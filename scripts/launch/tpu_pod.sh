#!/usr/bin/env bash
# Train on a pod of TPU VMs, one process a VM; JAX finds the processes itself. Not run: no pod was at hand.
#
#   NAME=pod ZONE=us-west4-a BUCKET=my-bucket bash scripts/launch/tpu_pod.sh
#
# From your own machine, with gcloud; the bucket holds the data and the runs. Started again, the run goes on.
set -euo pipefail
: "${NAME:?name of the TPU VM}" "${ZONE:?its zone}" "${BUCKET:?bucket of data and runs}"
TYPE=${TYPE:-v5litepod-16}
VERSION=${VERSION:-v2-alpha-tpuv5-lite}

gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" > /dev/null 2>&1 ||
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$VERSION"

gcloud compute tpus tpu-vm scp --recurse --worker=all --zone "$ZONE" . "$NAME":pushpull_jax

# The data are read from the bucket as from a folder; the run is written to it directly.
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "
    set -e
    python3 -m venv ~/venv && source ~/venv/bin/activate
    pip install --quiet -c ~/pushpull_jax/constraints.txt -e ~/pushpull_jax[gcs,tpu]
    mkdir -p ~/bucket
    mountpoint -q ~/bucket || gcsfuse --implicit-dirs $BUCKET ~/bucket
"

# It ends with 75 when a VM was preempted: its state is saved, and the same command goes on.
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "
    source ~/venv/bin/activate
    pushpull train quick \
        --data.root ~/bucket/mvtec_ad --data.category bottle --workdir gs://$BUCKET/runs/bottle \
        --mesh.data -1 --hosts.heartbeat_timeout_seconds 60
"
