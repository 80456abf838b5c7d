# megatron-ds with the tested versions, for GPUs (the default target) or for a CPU:
#   docker build -t megatron-ds .
#   docker build -t megatron-ds:cpu --target cpu .
#   docker run --gpus all --shm-size 8g -v "$PWD:/work" megatron-ds train run.yaml --nproc 8
# DeepSpeed compiles some of its operators when they are first used, such as its optimizer for offload. This takes the
# compilers here, and on GPUs the CUDA toolkit of the major version that torch was built with.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip install --no-cache-dir build && python -m build --wheel --outdir /dist

FROM ${PYTHON_IMAGE} AS cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /tmp/
RUN --mount=from=wheel,source=/dist,target=/dist \
    python -m pip install --no-cache-dir -c /tmp/requirements.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu /dist/*.whl
ENV DS_ACCELERATOR=cpu
RUN useradd --create-home trainer
USER trainer
WORKDIR /work
ENTRYPOINT ["megatron-ds"]
CMD ["--help"]

FROM ${CUDA_IMAGE} AS cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY requirements.txt /tmp/
RUN --mount=from=wheel,source=/dist,target=/dist \
    python -m pip install --no-cache-dir -c /tmp/requirements.txt /dist/*.whl
RUN useradd --create-home trainer
USER trainer
WORKDIR /work
ENTRYPOINT ["megatron-ds"]
CMD ["--help"]
