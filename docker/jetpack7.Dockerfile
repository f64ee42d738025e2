# Keepsight for Jetson Thor and Orin on JetPack 7 (Ubuntu 24.04, Python 3.12, CUDA 13).
#
# Not yet built or run: written from the documentation and reports that Jetson.md names. Build it on the board, in the
# repository's root; the defaults are JetPack 7.2 on an Orin:
#   docker build --file docker/jetpack7.Dockerfile --tag keepsight:jetpack7 .
# Thor, JetPack 7.2:  --build-arg CUDA_ARCHITECTURE=110-real
# Thor, JetPack 7.1:  --build-arg CUDA_ARCHITECTURE=110-real --build-arg JETSON_RELEASE=r38.4
#                     --build-arg BASE=nvcr.io/nvidia/cuda:13.0.0-devel-ubuntu24.04
#
# NVIDIA's l4t-jetpack images end with JetPack 6. JetPack 7 runs ordinary CUDA images for Arm servers, whose TensorRT is another
# build than the board's: TensorRT and the GStreamer elements come from JetPack's own repository, at the board's release.
ARG BASE=nvcr.io/nvidia/cuda:13.2.1-devel-ubuntu24.04
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive

ARG JETSON_RELEASE=r39.2
ADD --chmod=644 https://repo.download.nvidia.com/jetson/jetson-ota-public.asc /usr/share/keyrings/jetson-ota-public.asc
# The marker file lets packages of the board's boot chain install outside a board. cuda/compat is for discrete GPUs.
# hadolint ignore=DL3008 # the base image's distribution and JetPack's release decide the versions
RUN for repository in common som; do \
        echo "deb [signed-by=/usr/share/keyrings/jetson-ota-public.asc] https://repo.download.nvidia.com/jetson/${repository} ${JETSON_RELEASE} main"; \
    done > /etc/apt/sources.list.d/nvidia-l4t.list \
    && printf 'Package: *nvinfer* *nvonnxparsers*\nPin: origin repo.download.nvidia.com\nPin-Priority: 700\n' \
        > /etc/apt/preferences.d/jetpack-tensorrt \
    && mkdir -p /opt/nvidia/l4t-packages \
    && touch /opt/nvidia/l4t-packages/.nv-l4t-disable-boot-fw-update-in-preinstall \
    && rm -rf /usr/local/cuda/compat \
    && apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential python3-venv v4l-utils \
        python3-gi python3-gst-1.0 gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 \
        gstreamer1.0-tools gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-bad \
        gstreamer1.0-plugins-ugly gstreamer1.0-libav gstreamer1.0-rtsp \
        nvidia-l4t-gstreamer python3-libnvinfer \
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
