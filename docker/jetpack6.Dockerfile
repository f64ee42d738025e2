# Keepsight for Jetson Orin on JetPack 6 (L4T 36.4 and 36.5: Ubuntu 22.04, Python 3.10, CUDA 12.6, TensorRT 10.3).
#
# Not yet built or run: written from the documentation that Jetson.md names. Build it on the board, in the repository's root:
#   docker build --file docker/jetpack6.Dockerfile --tag keepsight:jetpack6 .
#
# The driver, JetPack's GStreamer elements and a library that TensorRT links (libnvdla_compiler.so) are not in the image: the
# NVIDIA container runtime mounts them from the board, so nothing here may import tensorrt while it is built.
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive

# hadolint ignore=DL3008 # the base image's distribution decides the versions
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential python3-venv v4l-utils \
        python3-gi python3-gst-1.0 gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 \
        gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad \
        gstreamer1.0-plugins-ugly gstreamer1.0-libav gstreamer1.0-rtsp \
        python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*

# /data: bundles, their engines, snapshots, recordings and the cache: everything that is written.
RUN useradd --system --uid 10001 --create-home --home-dir /data keepsight

# llama.cpp first: it takes longest, and changes least. Without the virtual-memory pool, whose reservation of 32 GB of addresses
# fails on 8 GB boards; it also leaves libcuda.so.1, which an image has only while it runs, out of what is linked.
ARG CUDA_ARCHITECTURE=87-real
ARG JOBS=2
WORKDIR /usr/src/keepsight
COPY pyproject.toml README.md LICENSE ./
COPY scripts/llama-wheel scripts/progress.sh scripts/
RUN /usr/bin/python3 -m venv --system-site-packages /opt/keepsight \
    && wheel=$(CUDACXX=/usr/local/cuda/bin/nvcc CMAKE_BUILD_PARALLEL_LEVEL="${JOBS}" KEEPSIGHT_CACHE=/tmp/keepsight \
        CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURE} -DGGML_CUDA_NO_VMM=ON" \
        PYTHON=/opt/keepsight/bin/python scripts/llama-wheel) \
    && /opt/keepsight/bin/python -m pip install --no-cache-dir --no-deps "${wheel}" \
    && rm -rf /tmp/keepsight

COPY export export
COPY runtime runtime
COPY streams streams
RUN /opt/keepsight/bin/python -m pip install --no-cache-dir ".[tiny,tensorrt]"

ENV KEEPSIGHT_CACHE=/data/cache GGML_NO_BACKTRACE=1
VOLUME /data
WORKDIR /data
USER 10001

ENTRYPOINT ["/opt/keepsight/bin/keepsight"]
CMD ["--help"]
