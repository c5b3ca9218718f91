#!/usr/bin/env bash
# Runs the tests, after setting up. Arguments are passed on to pytest: tools/test.sh -m "not slow"; -m "" runs
# also those that repeat a slow check on other numbers of ranks.
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
# Files are handed out in the order that tests/conftest.py gives them. A worker that dies ends the run: pytest-xdist 3.8 would start another one, and might then wait for ever.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not exhaustive" "$@"
