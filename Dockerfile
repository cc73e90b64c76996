# qswin with ONNX Runtime, TensorRT-RTX and our own kernels, in the releases that CI tests.
#
#     docker build --tag qswin .
#     docker run --rm --gpus all --volume "$PWD:/home/qswin/jobs" qswin calibrate --config x.yaml data.root=photos
#
# Without an NVIDIA GPU leave out --gpus: calibration, export and ONNX Runtime run on the CPU.
FROM python:3.11.14-slim-bookworm

# Packages (build --target inductor) are compiled by a C++ compiler
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

COPY constraints/lock.txt /tmp/lock.txt
COPY pyproject.toml README.md LICENSE /tmp/qswin/
COPY qswin /tmp/qswin/qswin
COPY models /tmp/qswin/models
COPY calib /tmp/qswin/calib
COPY qat /tmp/qswin/qat
COPY trt /tmp/qswin/trt
RUN pip install --no-cache-dir --constraint /tmp/lock.txt '/tmp/qswin[rtx,cvt,plot,segmentation]' \
 && rm -rf /tmp/qswin /tmp/lock.txt

# Jobs need no rights of root. A folder of yours that is mounted must be writable for user 1000.
RUN useradd --uid 1000 --create-home qswin
USER qswin
WORKDIR /home/qswin/jobs
ENTRYPOINT ["qswin"]
