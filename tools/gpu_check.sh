#!/usr/bin/env bash
# Runs on one GPU, in under nine minutes, what only a GPU can show, and writes a report: docs/gpu_check.md.
# It installs nothing: parts whose packages are missing are skipped. On a CPU: tools/gpu_check.sh --rehearse
# PYTHON=... chooses the interpreter; without it .venv's is taken, or python3.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH="$PWD:$PWD/tools:$PWD/tools/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" -m gpu_check --check "${GPU_CHECK:-gpu}" "$@"
