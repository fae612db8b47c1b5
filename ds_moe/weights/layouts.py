"""The two layouts in which files store stacked experts."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ds_moe.errors import UserError

Layout = Literal["memory", "hub"]


LAYOUTS: dict[str, str] = {
    "memory": "as transformers keeps experts in memory: (E, 2I, H) and (E, H, I)",
    "hub": "as the Qwen3-VL-MoE checkpoints on the hub store experts: (E, H, 2I) and (E, I, H)",
}


def choose_layout(config: Any, layout: Layout | None) -> Layout:
    """The layout asked for; None: `hub` for the family that has it and where it is unambiguous, else `memory`.

    Args:
        config: transformers' config of the model.

    Raises:
        UserError: a layout this model cannot be stored in.
    """
    problem = hub_layout_problem(config)
    if layout == "hub" and problem is not None:
        raise UserError(f"--layout hub cannot store this model: {problem}; use --layout memory")
    return layout or ("memory" if problem is not None else "hub")


def hub_layout_problem(config: Any) -> str | None:
    """Why experts cannot be stored transposed, or None where they can."""
    if config.model_type != "qwen3_vl_moe":
        return f"only qwen3_vl_moe checkpoints have it, this is {config.model_type}"
    text = config.get_text_config()
    width = text.moe_intermediate_size
    if text.hidden_size in (width, 2 * width):
        times = "moe_intermediate_size" if text.hidden_size == width else "twice moe_intermediate_size"
        return (
            f"hidden_size {text.hidden_size} is {times}, so transformers could not tell the "
            "transposed experts apart and would load them wrong"
        )
    return None


def in_layout(expert: Tensor, layout: Layout) -> Tensor:
    """A stacked expert weight as `layout` stores it, from how memory keeps it (a view)."""
    return expert.transpose(1, 2) if layout == "hub" else expert
