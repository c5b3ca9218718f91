#!/usr/bin/env bash
# Builds a source distribution and a wheel, installs the wheel into an environment of its own, and trains with the
# files that it brings, from an empty directory. Of the other packages, that environment sees those of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1
unset PYTHONPATH

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python -m build --no-isolation --outdir "$out/dist" . >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
python -m venv --without-pip "$out/venv"
# Not what .pth files there add: the checkout.
packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" >"$out/venv/lib/$(basename "$(dirname "$packages")")/site-packages/others.pth"
python -m pip --python "$out/venv/bin/python" install --quiet --no-deps --no-index "$out"/dist/*.whl

mkdir "$out/empty"
cd "$out/empty"
"$out/venv/bin/python" - "$out" <<'PYTHON'
import sys
import shardes

assert shardes.__file__.startswith(sys.argv[1]), f"imported from {shardes.__file__}, not from the wheel"
PYTHON
"$out/venv/bin/shardes" quickstart
"$out/venv/bin/shardes" train --config configs/quickstart.yaml parallel.backend=single es.iterations=2 \
  es.population=4 eval.every=2 run.dir="$out/run"
"$out/venv/bin/shardes" --version
