"""Demos, a folder each: `demo` is the command, `plot` draws its result.

- `digits`    trains a Qwen3-VL-MoE to read handwritten digits and exports it
- `replay`    reinforcement with routing replay and without
- `gate`      a learned gate over four LoRA adapters, on rendered `screens`
- `assemble`  two experts trained apart become one mixture of experts
- `score`     exact-match accuracy of an exported model, with plain transformers
"""
