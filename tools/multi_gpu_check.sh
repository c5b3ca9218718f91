#!/usr/bin/env bash
# Runs on 2 to 8 GPUs of one machine what only several can show, with NCCL, and writes a report: docs/gpu_check.md.
# On a CPU, with gloo: tools/multi_gpu_check.sh --rehearse
GPU_CHECK=multi_gpu exec bash "$(dirname "$0")/gpu_check.sh" "$@"
