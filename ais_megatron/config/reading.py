"""Turns a YAML file plus ``key=value`` overrides into a `Config`, and a `Config` into YAML.

OmegaConf merges the file and the overrides. pydantic checks names, types and every combination that can be judged without
starting a process. One `ConfigError` reports all mistakes. Nothing here imports torch, so a typo is found in milliseconds and
before any node of a cluster is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ais_megatron.config.errors import ConfigError, explain
from ais_megatron.config.experiment import Config
from ais_megatron.config.hf_config import read_architecture
from ais_megatron.models.registry import FAMILIES


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides in order, and check everything.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the message names the nearest one), a type is wrong, or a combination
            is impossible.
    """
    return build_config(read_yaml(path, overrides))


def read_yaml(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The content of a YAML file with ``key=value`` overrides applied in order. Names and types are not checked.

    Raises:
        ConfigError: the file cannot be read or is not a mapping, or an override is not ``key=value``.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError(f"override {bad[0]!r}: write key=value, for example train.steps=10, and put quotes around a value with spaces")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: expected a mapping of sections, got {type(loaded).__name__}")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
        assert isinstance(plain, dict)  # two mappings merge into one
        return {str(section): value for section, value in plain.items()}
    except ConfigError:
        raise
    except (OmegaConfBaseException, OSError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # PyYAML's errors and OmegaConf's have no public base class in common
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        raise


def build_config(data: dict[str, Any]) -> Config:
    """Check a nested mapping and return it as a frozen `Config`, see `load_config`. If ``model.path`` is set, its config.json gives
    ``model.architecture``. For a diffusion model ``rollout.kv_cache=auto`` is ``none``."""
    model = data.get("model")
    if isinstance(model, dict) and model.get("path"):
        data = {**data, "model": {**model, "architecture": read_architecture(model["path"]).model_dump()}}
    model, rollout = data.get("model"), data.get("rollout") or {}
    architecture = model.get("architecture") if isinstance(model, dict) else None
    family = FAMILIES.get(str(architecture.get("model_type"))) if isinstance(architecture, dict) else None
    if family is not None and family.is_diffusion and isinstance(rollout, dict) and rollout.get("kv_cache", "auto") == "auto":
        data = {**data, "rollout": {**rollout, "kv_cache": "none"}}
    try:
        return Config(**data)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML. `load_config` turns it into an equal `Config` again."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
