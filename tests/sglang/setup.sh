#!/usr/bin/env bash
# setup.sh VENV [PYTHON]: an environment that holds the real SGLang, made to run on any x86-64 CPU. About 3 GB, 2-3 minutes.
#
# SGLang asks for a CUDA torch and for packages that exist only as CUDA builds. So it is installed without its dependencies,
# which follow one by one in the versions it pins, with the torch that the rest of this project is tested with. What pip says
# about that goes to VENV/setup.log; the end of it is shown when something fails.
set -euo pipefail

venv=${1:?usage: setup.sh VENV [PYTHON]}
python=${2:-python3.11}
torch=torch==2.13.0

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
log=$venv/setup.log
: >"$log"

install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@" >>"$log" 2>&1 || {
        tail -n 30 "$log" >&2
        echo "setup.sh: installing failed; the whole log is $log" >&2
        exit 1
    }
}

install "$torch"
install --no-deps sglang==0.5.23
install "$torch" aiohttp "anthropic>=0.20.0" apache-tvm-ffi==0.1.11 blobfile==3.0.0 cffi compressed-tensors==0.18.0 datasets \
    distro easydict einops fastapi gguf interegular IPython "llguidance>=1.7.6,<2" msgspec ninja numba==0.65.1 numpy \
    nvidia-ml-py openai==2.8.0 openai-harmony==0.0.4 orjson outlines==0.1.11 packaging partial_json_parser pillow \
    "prometheus-client>=0.20.0" psutil pybase64 pydantic "python-dateutil<3" python-multipart pyzmq regex requests scipy \
    sentencepiece==0.2.1 setproctitle tiktoken tokenizers==0.23.2 tqdm transformers==5.19.0 "uvicorn>=0.51" uvloop watchfiles \
    xxhash zstandard
install --no-deps soundfile==0.13.1 torch_memory_saver torchvision==0.28.0 triton==3.7.1 xgrammar==0.2.7

# A CUDA build of torchvision does not load its C++ operators beside a CPU torch, and then stumbles over the two of them for
# which it registers fakes. SGLang imports torchvision without using it: defining the two names is enough.
"$venv/bin/python" - <<'PY'
import pathlib
import sysconfig

MARK = "# ais_megatron: operators of a build that did not load\n"
path = pathlib.Path(sysconfig.get_paths()["purelib"]) / "torchvision" / "_meta_registrations.py"
text, target = path.read_text(), 'register_fake("torchvision::nms")'
if MARK not in text:
    assert target in text, f"{path}: not the torchvision that setup.sh knows"
    line = text.rindex("\n", 0, text.index(target)) + 1  # where the decorator begins
    define = MARK + "if not torchvision.extension._has_ops():\n    from torch import library\n\n"
    for name in ("nms", "qnms"):
        define += f'    library.define("torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
    path.write_text(text[:line] + define + "\n\n" + text[line:])
PY

here=$(cd "$(dirname "$0")" && pwd)
install --no-deps --editable "$here/../.." --editable "$here/shim"
