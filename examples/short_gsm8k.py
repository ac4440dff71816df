"""Selects the short problems of GSM8K, for models that are too small for the others.

    python -m examples.short_gsm8k data/gsm8k data/gsm8k_short

A problem is kept if its worked solution has one or two calculations and its question at most 240 characters. Training and test problems
stay apart, as GSM8K separates them. The files have the same columns, so `task.name=gsm8k` reads them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

MAX_CALCULATIONS, MAX_QUESTION_CHARS = 2, 240
CALCULATION = "<<"  # GSM8K marks each calculation of a solution, for example <<48/2=24>>


def is_short(row: dict[str, str]) -> bool:
    return 1 <= row["answer"].count(CALCULATION) <= MAX_CALCULATIONS and len(row["question"]) <= MAX_QUESTION_CHARS


def select(source: Path, out: Path) -> int:
    """Copy the short problems of a JSONL file to `out`, and return their number."""
    rows = [json.loads(line) for line in source.read_bytes().split(b"\n") if line.strip()]
    kept = [row for row in rows if is_short(row)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    return len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("out", type=Path, help="folder for the selected problems")
    args = parser.parse_args()
    for name in ("train.jsonl", "test.jsonl"):
        print(f"{args.out / name}: {select(args.source / name, args.out / name)} problems")


if __name__ == "__main__":
    main()
