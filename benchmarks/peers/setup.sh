#!/usr/bin/env bash
# setup.sh trl|verl VENV [PYTHON]: an environment for one peer, pinned.
set -euo pipefail
peer=${1:?usage: setup.sh trl|verl VENV [PYTHON]}
venv=${2:?usage: setup.sh trl|verl VENV [PYTHON]}
"${3:-python3.11}" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@"; }
install torch==2.13.0
case $peer in
    trl) install trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 ;;
    verl) # of its dependencies only what the correction helper imports: the rest wants a GPU
        install codetiming==1.4.0 hydra-core numpy omegaconf orjson packaging pandas ray==2.60.0 tensordict==0.10.0 transformers==5.10.4
        install --no-deps verl==0.9.1 ;;
    *) echo "setup.sh: no peer $peer" >&2 && exit 2 ;;
esac
