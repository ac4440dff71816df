"""Makes short arithmetic problems from the worked solutions of GSM8K, for models that are too small for its word problems.

    python -m examples.gsm8k_calculations data/gsm8k data/gsm8k_calculations

GSM8K marks each calculation of a solution, for example <<48/2=24>>. From it comes the line {"question": "What is 48 / 2?", "answer": 24},
which `task.name=qa` reads. Only calculations with two whole numbers and a whole result are used, each once. Calculations that occur in
both files are left out of the training file, so held-out problems are never trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

CALCULATION = re.compile(r"<<([0-9]{1,4})([-+*/])([0-9]{1,4})=([0-9]{1,6})>>")


def calculations(file: Path) -> dict[str, int]:
    """The result of each calculation in the solutions of a GSM8K file, in the order in which they first occur."""
    found = CALCULATION.findall(file.read_text(encoding="utf-8"))
    return {f"{left} {operator} {right}": int(result) for left, operator, right, result in found}


def write(problems: dict[str, int], file: Path) -> None:
    order = list(problems)
    random.Random(0).shuffle(order)  # so that the first problems are not those of a few solutions
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": f"What is {question}?", "answer": problems[question]}) + "\n" for question in order]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} problems")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("out", type=Path, help="folder for the problems")
    args = parser.parse_args()
    train, test = (calculations(args.source / f"{split}.jsonl") for split in ("train", "test"))
    write({question: result for question, result in train.items() if question not in test}, args.out / "train.jsonl")
    write(test, args.out / "test.jsonl")


if __name__ == "__main__":
    main()
