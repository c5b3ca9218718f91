#!/usr/bin/env bash
# From a fresh machine to a learning curve: sets up, trains under deepspeed on 2 ranks, exports, and plots.
# On a machine with a single GPU: RANKS=1 tools/quickstart.sh
# Arguments are passed on to the training, for example: tools/quickstart.sh run.dir=runs/again es.seed=1
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
run_dir=runs/quickstart
for argument in "$@"; do
  case "$argument" in
    run.dir=* | --run.dir=*) run_dir=${argument#*=} ;;
  esac
done
deepspeed --num_gpus "${RANKS:-2}" launch/train.py --config configs/quickstart.yaml "$@"
shardes plot "$run_dir" --out "$run_dir/reward.png"
