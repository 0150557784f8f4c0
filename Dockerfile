# A machine with a GPU that runs the full profile, from the lock:
#   docker build --tag lipguide .
#   docker run --gpus all --volume lipguide:/lipguide lipguide
# CUDA itself comes with torch; the host brings the driver and the NVIDIA Container Toolkit. The volume keeps what has been
# trained, so that a run which stopped goes on. Another command at the end of the line takes the place of CMD.
FROM python:3.11-slim-bookworm

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /lipguide
COPY . .
RUN make setup
CMD ["make", "book", "PROFILE=full", "DEVICE=cuda"]
