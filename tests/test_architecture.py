"""The walls of the house: imports point downward, there are no circles, and two libraries stay behind their fences."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ais_megatron"

# Lower floors first; a module may import from its own floor and below. policy and rollout share a floor but never meet.
FLOORS = [
    {"section", "doors", "engine_traits", "algorithm_config", "sglang_config", "config", "batch", "shapes", "exits", "ports", "nccl"},
    {"run_folder", "comparison_config", "hf_config", "layout", "checkpoint_files", "memory_model", "cost_model", "plan", "keys"},
    {"cuda_environment", "launcher", "distributed", "metrics", "summary", "doctor", "sglang_doctor", "gpu_checks", "needs", "watchdog"},
    {"report"},
    {"scaling", "comparison", "comparison_report"},
    {"algorithm", "tasks", "quantization", "tokenizer"},
    {"prompts"},
    {"policy", "rollout"},
    {"weight_sync", "sft", "update", "interruption"},
    {"generation"},
    {"session"},
    {"collection"},
    {"trainer"},
    {"cli"},
    {"__main__"},
]
FENCES = {"megatron": "policy", "transformer_engine": "policy", "sglang": "rollout"}


def part_of(path: Path) -> str:
    """``policy`` for policy/model.py, ``trainer`` for trainer.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def test_imports_point_downward() -> None:
    floor_of = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    for path in modules():
        here = part_of(path)
        for name in imports_of(path):
            if name.startswith("ais_megatron."):
                there = name.split(".")[1]
                assert floor_of[there] <= floor_of[here], f"{path.name} ({here}) imports {name}, which stands above it"
                assert {here, there} != {"policy", "rollout"}, f"{path.name}: policy and rollout meet in weight_sync only"


def test_no_circles() -> None:
    known = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in modules()}
    below: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = imports_of(path)
        below[name] = {t for t in known if t != name and any(i == t or i.rpartition(".")[0] == t for i in targets)}
    while below:
        leaves = [name for name, targets in below.items() if not targets & below.keys()]
        assert leaves, f"circular imports among {sorted(below)}"
        for name in leaves:
            del below[name]


def test_fences() -> None:
    for path in modules():
        for name in imports_of(path):
            library = name.split(".")[0]
            if library in FENCES:
                assert part_of(path) == FENCES[library], f"{path.name} imports {name}; only {FENCES[library]}/ may"


def test_configuration_needs_no_torch() -> None:
    for name in (
        "config.py",
        "layout.py",
        "memory_model.py",
        "cost_model.py",
        "plan.py",
        "keys.py",
        "doors.py",
        "algorithm_config.py",
        "run_folder.py",
        "cli.py",
        "launcher.py",
        "checkpoint_files.py",
        "exits.py",
        "comparison_config.py",
        "comparison.py",
    ):
        tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
        top = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        top += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not any(module and module.split(".")[0] in ("torch", "megatron") for module in top), name
