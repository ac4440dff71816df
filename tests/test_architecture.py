"""The walls of the house: imports point downward, there are no circles, and libraries and engines stay behind their fences."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "ais_megatron"

# Lower floors first. A module may import from its own floor and from those below. A name is a folder or a module at the top;
# a module that stands lower than its folder has an entry of its own.
FLOORS = [
    {"models"},
    {"config", "batch", "shapes", "cluster.exits", "cluster.ports"},
    {"runs"},
    {"cluster", "planning"},
    {"distributed", "comparison"},
    {"algorithm", "tasks", "quantization", "tokenizer"},
    {"prompts", "export"},
    {"policy", "rollout"},
    {"weight_sync", "sft", "update", "interruption"},
    {"generation", "turns"},
    {"session"},
    {"collection", "evaluation", "lm_harness"},
    {"trainer"},
    {"cli"},
    {"__main__"},
]
FENCES = {"megatron": "policy", "transformer_engine": "policy", "sglang": "rollout.sglang"}
STRANGERS = [{"policy", "rollout"}, {"rollout.local", "rollout.sglang"}, {"cluster", "planning"}]
TORCH_FREE = ("models", "config", "planning", "runs", "comparison", "cli", "cluster.launcher", "cluster.layout", "cluster.exits")
COLLECTIVES = {
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all_single", "barrier", "broadcast"),
    *("broadcast_object_list", "reduce_scatter", "all_reduce_sum", "broadcast_text", "gather_batch", "raise_together", "rank_consistent"),
    *("reduce_metrics", "export_buckets", "export_frozen_buckets", "export_factor_buckets", "weight_stream", "update_weights", "save_hf"),
}
MODULES_AT_THE_TOP = 19


def name_of(path: Path) -> str:
    """``policy.model`` for policy/model.py, ``policy`` for policy/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def is_within(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def imports_of(path: Path, *, lazy: bool = True) -> set[str]:
    """Whole names of what a module imports; ``lazy=False``: only when it is itself imported."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    return {name_of(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def ours(path: Path) -> set[str]:
    return {name.removeprefix("ais_megatron.") for name in imports_of(path) if name.startswith("ais_megatron.")}


def floor_of(module: str) -> int:
    places = {place: number for number, floor in enumerate(FLOORS) for place in floor if is_within(module, place)}
    assert places, f"{module} stands on no floor: add it to FLOORS"
    return places[max(places, key=len)]


def test_imports_point_downward() -> None:
    for here, path in modules().items():
        for there in ours(path):
            assert floor_of(there) <= floor_of(here), f"{here} imports {there}, which stands above it"


def test_strangers_never_meet() -> None:
    for here, path in modules().items():
        for there in ours(path):
            for first, second in STRANGERS:
                for a, b in ((first, second), (second, first)):
                    assert not (is_within(here, a) and is_within(there, b)), f"{here} imports {there}, but {a} and {b} are strangers"


def test_no_circles() -> None:
    known = modules()
    below: dict[str, set[str]] = {}
    for name, path in known.items():
        below[name] = {there if there in known else there.rpartition(".")[0] for there in ours(path)} & known.keys() - {name}
    while below:
        leaves = [name for name, targets in below.items() if not targets & below.keys()]
        assert leaves, f"circular imports among {sorted(below)}"
        for name in leaves:
            del below[name]


def test_fences() -> None:
    for here, path in modules().items():
        for name in imports_of(path):
            fence = FENCES.get(name.split(".")[0])
            assert fence is None or is_within(here, fence), f"{here} imports {name}; only {fence} may"


def test_what_reads_configurations_needs_no_torch() -> None:
    for here, path in modules().items():
        if any(is_within(here, place) for place in TORCH_FREE):
            heavy = {name for name in imports_of(path, lazy=False) if name.split(".")[0] in ("torch", "megatron")}
            assert not heavy, f"{here} imports {heavy} when it is imported"


def test_the_house_has_rooms() -> None:
    at_the_top = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    assert len(at_the_top) <= MODULES_AT_THE_TOP, at_the_top


def test_sglangs_process_imports_the_plugin_alone() -> None:
    for folder in ("rollout", "rollout/sglang"):
        assert not (PACKAGE / folder / "__init__.py").read_text().strip(), f"{folder}/__init__.py is imported by every SGLang server"


def is_call_of(node: ast.AST, names: set[str]) -> bool:
    if not isinstance(node, ast.Call):
        return False
    return (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")) in names


def test_no_collective_inside_rank_consistent() -> None:
    """A rank that raises leaves the block at once, and the others would wait in the collective for ever."""
    for here, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.With) and any(is_call_of(item.context_expr, {"rank_consistent"}) for item in node.items):
                calls = [inner for part in node.body for inner in ast.walk(part) if is_call_of(inner, COLLECTIVES)]
                assert not calls, f"{here}, line {calls[0].lineno}: {ast.unparse(calls[0])} is a collective; see `raise_together`"
