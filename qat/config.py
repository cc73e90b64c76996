"""Reads a config: a YAML file and `key=value` overrides over the schema."""

import difflib
import re
from pathlib import Path
from typing import Any, cast

import yaml
from absl import logging
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qswin.calib.reading import compose_yaml, construct_yaml, parse_yaml
from qswin.qat.schema import FREE, RENAMED, Config, keys_of

KEYS = keys_of()


def load_config(file: str | Path, overrides: list[str]) -> Config:
    """The schema's defaults, under the YAML file, under the overrides (`train.lr=1e-4`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown (the nearest is named), a value has the wrong type, is not allowed or is missing;
            where it stands (file and line, or the override) comes first.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config; the ones that come with qswin are in configs/")
    config = OmegaConf.structured(Config)
    for key, value, where in (*_entries_of_file(path), *map(_entry_of_override, overrides)):
        _set(config, _current(key, where), value, where)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ValueError(f"{path}: {missing[0]} is not set; add {missing[0]}=VALUE to the command line")
    loaded = cast(Config, OmegaConf.to_object(config))
    if loaded.train.min_lr > loaded.train.lr:
        raise ValueError(f"{path}: train.min_lr={loaded.train.min_lr} is above train.lr={loaded.train.lr}; lower it")
    return loaded


def _entries_of_file(path: Path) -> list[tuple[str, Any, str]]:
    """(key, value, "file:line") of every leaf of a YAML file."""
    root = compose_yaml(path)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: not a mapping of settings; see configs/ for examples")
    return [(key, value, f"{path}:{line}") for key, value, line in _leaves(root, "", path)]


def _leaves(node: yaml.MappingNode, prefix: str, path: Path) -> list[tuple[str, Any, int]]:
    """Sections of the schema are entered; everything else is a value, however deep."""
    leaves = []
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        section = any(known.startswith(f"{key}.") for known in KEYS)
        if section and isinstance(value_node, yaml.MappingNode):
            leaves += _leaves(value_node, f"{key}.", path)
        elif not (section and value_node.tag == "tag:yaml.org,2002:null"):  # one whose keys are all comments
            line = key_node.start_mark.line + 1
            leaves.append((key, construct_yaml(value_node, f"{path}:{line}"), line))
    return leaves


def _entry_of_override(override: str) -> tuple[str, Any, str]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override!r}: an override is written key=value, for instance train.lr=1e-4")
    where = f"override {override!r}"
    return key, parse_yaml(text, where), where


def _current(key: str, where: str) -> str:
    """The name of a key today; an old one is read, with a warning."""
    if key in RENAMED:
        logging.warning("%s: %s is an old name; write %s", where, key, RENAMED[key])
    return RENAMED.get(key, key)


def _set(config: DictConfig, key: str, value: Any, where: str) -> None:
    """Raises ValueError, after where the value stands, for a key or value that the schema does not have."""
    if key not in KEYS and not key.startswith(FREE):
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown key {key!r}; the nearest is {near!r}")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4, without a dot, as text
    if "${" in repr(value):
        raise ValueError(f"{where}: {key}: ${{...}} is not expanded; write the value out")
    try:
        OmegaConf.update(config, key, value, force_add=True)
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{where}: {key}: {reason}") from error
    if key in KEYS:
        try:
            KEYS[key].check(OmegaConf.select(config, key))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def settings_of(config: Config) -> dict[str, Any]:
    """A config as plain data, such that its YAML is a config file."""
    plain = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))
    return cast(dict[str, Any], yaml.safe_load(yaml.safe_dump(plain)))
