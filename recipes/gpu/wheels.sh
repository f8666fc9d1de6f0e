#!/usr/bin/env bash
# Collects the packages that a GPU machine without a network may lack, as wheels for check.sh.
#
#   bash recipes/gpu/wheels.sh [--dir DIR]      DIR: .whl in the repository unless given
#
# Run it where pip reaches an index, then copy the repository with the folder to the GPU machine.
# Wheels are for Python 3.12 on x86-64 Linux; PYTHON_VERSION=3.11 names another one. torch, triton
# and transformers are not among them: that machine has them. The folder has less than 60 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

dir=.whl
while [ $# -gt 0 ]; do
  case "$1" in
    --dir) dir="${2:?--dir: expected a folder}"; shift 2 ;;
    *) echo "usage: bash recipes/gpu/wheels.sh [--dir DIR]" >&2; exit 2 ;;
  esac
done
python="${PYTHON:-}"
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
version="${PYTHON_VERSION:-3.12}"

# What qzo needs besides torch and transformers, and what its tests need
required=(
  pydantic==2.14.4 pydantic_core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5
  jaxtyping==0.3.11 wadler-lindig==0.1.8
  datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19
  gguf==0.19.0 bitsandbytes==0.50.2
  pytest==9.2.0 pluggy==1.7.0 iniconfig==2.3.1 pytest-xdist==3.8.0 execnet==2.1.2
  beartype==0.23.1 hypothesis==6.170.17 sortedcontainers==2.4.0
)
# What qzo bench compares with; a comparison without its package is skipped
optional=(peft==0.21.2 accelerate==1.15.0 humming-kernels==0.1.19)
from_source=(gemlite==0.6.0.post2) # pure Python, published as source alone

platforms=()
for platform in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 \
  manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010 manylinux_2_5 manylinux1; do
  platforms+=(--platform "${platform}_x86_64")
done

fetch() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp "${platforms[@]}" --dest "$dir" "$1"
}

mkdir -p "$dir"
rm -f "$dir"/*.whl # two versions of one package stop an installation
for package in "${required[@]}"; do
  fetch "$package" || { echo "$package: no wheel for Python $version" >&2; exit 1; }
done
for package in "${optional[@]}"; do
  fetch "$package" || echo "$package: no wheel for Python $version; left out" >&2
done
for package in "${from_source[@]}"; do
  "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$dir" "$package" ||
    echo "$package: cannot be built here; left out" >&2
done
git rev-parse HEAD > "$dir/COMMIT" 2>/dev/null || true
du -sh "$dir"
