"""What the layouts of several libraries have in common."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

NO_ABSOLUTE_POSITIONS = "a Swin with absolute position embeddings (ape), which is not supported; train it without"
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")  # that models compute themselves


def without_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without what a model computes itself."""
    return {key: value for key, value in state.items() if not key.endswith(BUFFERS)}


def next_stage(key: str) -> str:
    """`layers.1.downsample.norm.weight` of `layers.0.downsample.norm.weight`.

    timm merges patches where a stage begins, all others where the stage before ends.
    """
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) + 1}.downsample.", key)


def join_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with `attn.q`, `attn.k` and `attn.v`, each (C, C) and (C,), as one `attn.qkv`, (3C, C) and (3C,).

    A Swin V2's key has no bias: its query's and value's become `attn.q_bias` and `attn.v_bias`.
    """
    joined = {key: value for key, value in state.items() if not re.search(r"\.attn\.[qkv]\.", key)}
    for key in state:
        if key.endswith(".attn.q.weight"):
            attn = key.removesuffix("q.weight")
            joined[f"{attn}qkv.weight"] = torch.cat([state[f"{attn}{name}.weight"] for name in "qkv"])
        elif key.endswith(".attn.q.bias"):
            attn = key.removesuffix("q.bias")
            if f"{attn}k.bias" in state:
                joined[f"{attn}qkv.bias"] = torch.cat([state[f"{attn}{name}.bias"] for name in "qkv"])
            else:
                joined |= {f"{attn}{name}_bias": state[f"{attn}{name}.bias"] for name in "qv"}
    return joined


def window_of(state: Mapping[str, Tensor], ends: str = "relative_position_bias_table") -> list[int]:
    """The side of the window of each stage, by its first block: a table has (2 * side - 1)**2 rows.

    Args:
        ends: how the key of a table ends, under timm's names. V2's relative_coords_table is (1, 2 * side - 1, ..., 2).
    """
    tables: dict[int, Tensor] = {}
    for key, value in state.items():
        if match := re.match(rf"layers\.(\d+)\.blocks\.0\.attn\.{ends}$", key):
            tables[int(match[1])] = value
    sides = [(table.shape[1] if table.ndim == 4 else round(len(table) ** 0.5)) for _, table in sorted(tables.items())]
    return [(side + 1) // 2 for side in sides]


def feature_norms(state: Mapping[str, Tensor]) -> dict[str, bool]:
    """The setting of a backbone whose feature maps have norms, `norm0`, ...; none where the state lacks them."""
    return {"feature_norms": True} if any(re.match(r"norm\d\.", key) for key in state) else {}
