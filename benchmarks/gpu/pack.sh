#!/bin/sh
# Fetches the packages that a bare GPU machine lacks (it has torch, triton, transformers and numpy, and no internet).
#
#     benchmarks/gpu/pack.sh [DIR]         DIR: benchmarks/gpu/packages; PYTHON: an interpreter that has pip, python3
#
# The wheels are for Python 3.12 on x86_64 Linux, whatever this machine is. `run.sh` installs them with --no-deps, so every package
# that something imports stands here by name; the versions are those of pyproject.toml, and otherwise the newest.
set -eu
here=$(dirname "$0")
folder=${1:-$here/packages}
rm -rf "$folder"
mkdir -p "$folder"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --dest "$folder" --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    megatron-core==0.19.2 einops==0.8.2 psutil==7.2.2 \
    omegaconf==2.4.0 \
    pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions \
    sentencepiece==0.2.3 \
    rich==15.0.0 pygments markdown-it-py mdurl \
    matplotlib==3.11.2 contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil
# Where the sources travel without .git, this says which they were.
revision=$(git -C "$here" rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git -C "$here" status --porcelain 2>/dev/null)" ] || revision="$revision with changes"
echo "$revision" >"$folder/REVISION"
size=$(du -sm "$folder" | cut -f1)
echo "$(ls "$folder" | grep -c '\.whl$') packages, $size MB in $folder"
[ "$size" -lt 40 ] || { echo "more than the 40 MB that may travel" >&2; exit 1; }
