#!/usr/bin/env bash
# Makes .venv in the repository with everything that shardes, its quickstart and its tests need.
# Wants Python 3.11 or 3.12 (PYTHON=...), pip and a C compiler. Does nothing if it has run before.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.shardes-setup
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  "${PYTHON:-python3}" -m venv .venv
  # torch first and by its exact version, so that nothing that depends on it picks another build.
  .venv/bin/python -m pip install --quiet --constraint constraints.txt torch
  .venv/bin/python -m pip install --quiet --constraint constraints.txt \
    --editable '.[zero3,plot,data,math,tensorboard,wandb,environments,endpoint,verifiers,docs,dev]'
  echo "$wanted" >"$stamp"
fi
