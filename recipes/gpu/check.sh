#!/usr/bin/env bash
# Everything that a GPU can tell about QZO, in one command, in under eight minutes on an H100.
#
#   bash recipes/gpu/check.sh [--out DIR] [--only PART] [--device cuda|cpu] [--tiny] [--seconds N]
#
# Needs a Python with torch and transformers, and no network. What else is missing is installed from
# --wheels DIR (.whl unless given; recipes/gpu/wheels.sh fills it) into a folder of its own; nothing
# of the machine is changed. --out (runs/gpu unless given) takes report.md, report.json and log.txt.
# PYTHON names the interpreter: .venv/bin/python where there is one, else python3.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
started=$(date +%s)

wheels=.whl
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels="${2:?--wheels: expected a folder}"; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done

python="${PYTHON:-}"
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
if ! command -v "$python" >/dev/null 2>&1; then
  echo "check.sh: no $python; set PYTHON to one that has torch" >&2
  exit 1
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/qzo-gpu.XXXXXX") || exit 1
checkpoints=""
trap 'rm -rf "$work" "$checkpoints"' EXIT
mkdir -p "$work/home" "$work/site"
site="$work/site"
if compgen -G "$wheels/*.whl" >/dev/null; then
  if ! "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps \
    --no-compile --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl >"$work/pip.log" 2>&1; then
    tail -n 5 "$work/pip.log" >&2
    echo "check.sh: pip failed, so the wheels are unpacked instead" >&2
    for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
  fi
  export QZO_COMMIT="${QZO_COMMIT:-$(cat "$wheels/COMMIT" 2>/dev/null)}"
fi

# The 10 GiB of checkpoints are made in memory where that has 24 GiB to spare.
if [ "$(df --output=avail --block-size=G /dev/shm 2>/dev/null | tail -n 1 | tr -dc 0-9 || true)" -ge 24 ] 2>/dev/null; then
  checkpoints=$(mktemp -d /dev/shm/qzo-gpu.XXXXXX) && export QZO_CHECKPOINTS="$checkpoints"
fi

# Caches go where they can be written and are gone afterwards; nothing asks for a network.
export HOME="$work/home" XDG_CACHE_HOME="$work/home/.cache" MPLCONFIGDIR="$work/home/matplotlib"
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
export HF_HOME="$work/home/huggingface" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONNOUSERSITE=1 LC_ALL="${LC_ALL:-C.UTF-8}"
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" recipes/gpu/check.py --work "$work" --started "$started" ${arguments[@]+"${arguments[@]}"}
