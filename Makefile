# Two commands do everything on a fresh Debian or Ubuntu machine: `make demo` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help setup demo test-environment lint test results cost-check plan-check restart-test flatness memory-study int8-table av-alignment full-size fault-table soak frame-age stream-speed many-cameras side-cost profile-checks clean

# Settings of this machine that should outlast one command, as `export NAME := value`; not under version control.
-include local.mk

# The PyTorch that `make test` installs; `make demo` needs none. One exact release, so that tests mean the same everywhere.
# On x86-64 PyPI's build of it brings CUDA with it, several GB. Where PyTorch's CPU build is at hand, pip takes that instead:
# PIP_FIND_LINKS for a folder that holds it, PIP_EXTRA_INDEX_URL for the CPU index that PyTorch's install page names.
TORCH ?= torch==2.13.0
export TORCH

# llama.cpp would otherwise start a debugger for a backtrace when an assertion of its fails.
export GGML_NO_BACKTRACE := 1

help:
	@echo "make demo    set up what is missing, then run the demo (options: ARGS=...)"
	@echo "make test    set up what is missing, then ruff, mypy and pytest (options: PYTEST_ARGS=...)"
	@echo "make setup   only the set-up of make demo: system packages, .venv, llama.cpp, keepsight[tiny]"
	@echo "make lint    only ruff and mypy"
	@echo "make results measure the accuracy table of keepsight-tiny again (about 20 minutes)"
	@echo "make restart-test  kill a watching process 50 times, restore it, compare its answers with an unbroken run's (about 4 minutes)"
	@echo "make flatness time and memory over 100,000 frames again (about 30 minutes)"
	@echo "make memory-study measure how long memories hold, and what glitch frames do to them (about 15 minutes)"
	@echo "make int8-table quantise keepsight-tiny to 8 bits, and measure what that saves and costs (about 6 minutes)"
	@echo "make fault-table kill, freeze and restart cameras, damage files: what is shown, how soon, how soon frames are back (about 2 minutes)"
	@echo "make soak    lose a camera over and over for an hour (ARGS='--minutes 5'): file descriptors, threads, resident memory"
	@echo "make frame-age how old live 720p30 frames are in a fast and in slow readers' hands (about 2 minutes)"
	@echo "make stream-speed frames/s out of H.264 files of 720p and 1080p, copies of each frame, what reusing their memory saves (about 2 minutes)"
	@echo "make many-cameras eight RTSP cameras and one consumer: rates, ages, drops, fairness; one camera hangs, one is killed (about 2 minutes)"
	@echo "make side-cost what a preview and a recording cost beside a live 720p30 camera (about 2 minutes)"

	@echo "make profile-checks  do a profile's stages add up, what does profiling cost, do comparisons find what changed (about 20 minutes)"
	@echo "make av-alignment measure how far apart sound and pictures of the same moment come out of files of 10 minutes (about 2 minutes)"
	@echo "make cost-check compare the multiply-adds that exports count with onnx-tool's (half a minute)"
	@echo "make full-size export models of full size with random weights (30 GB of disk, 16 GB of memory, about 45 minutes)"
	@echo "make clean   remove .venv and everything built (not the cache of llama.cpp wheels)"
	@echo
	@echo "Settings, here or in local.mk: PYTHON, CMAKE_ARGS, TORCH, SKIP_APT=1, KEEPSIGHT_CACHE (now $${KEEPSIGHT_CACHE:-$${XDG_CACHE_HOME:-~/.cache}/keepsight})"

setup:
	@scripts/setup demo

demo: setup
	@.venv/bin/keepsight demo $(ARGS)

test-environment:
	@scripts/setup test

lint: test-environment
	@scripts/lint

test: lint
	@.venv/bin/python -m pytest -q --durations=10 $(PYTEST_ARGS)

results: test-environment
	@.venv/bin/python scripts/results-table
	@.venv/bin/python scripts/contact-sheet

restart-test: test-environment
	@.venv/bin/python scripts/restart-test $(ARGS)

flatness: test-environment
	@.venv/bin/python scripts/flatness

memory-study: test-environment
	@.venv/bin/python scripts/memory-study

int8-table: test-environment
	@.venv/bin/python scripts/int8-table

av-alignment: test-environment
	@.venv/bin/python scripts/av-alignment $(ARGS)

full-size: test-environment
	@.venv/bin/python scripts/full-size

fault-table: test-environment
	@.venv/bin/python scripts/fault-table $(ARGS)

soak: test-environment
	@.venv/bin/python scripts/soak $(ARGS)

frame-age: test-environment
	@.venv/bin/python scripts/frame-age $(ARGS)

cost-check: test-environment
	@.venv/bin/python -c "import onnx_tool" 2>/dev/null || .venv/bin/python -m pip install --no-deps onnx-tool tabulate
	@.venv/bin/python scripts/cost-check

stream-speed: test-environment
	@.venv/bin/python scripts/stream-speed $(ARGS)

many-cameras: test-environment
	@.venv/bin/python scripts/many-cameras $(ARGS)

side-cost: test-environment
	@.venv/bin/python scripts/side-cost $(ARGS)

profile-checks: test-environment
	@.venv/bin/python scripts/profile-checks $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
