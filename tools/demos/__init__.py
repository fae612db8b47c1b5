"""Demos, a folder each, whose command is `demo`.

- `digits`    trains a Qwen3-VL-MoE to read handwritten digits and exports it
- `replay`    reinforcement with routing replay and without
- `rl`        reinforcement with an engine in the loop: plain transformers, or a vLLM server on CPUs
- `gate`      a learned gate over four LoRA adapters, on rendered `screens`
- `assemble`  two experts trained apart become one mixture of experts
- `running`   what they share: programs that they run, and how they end
- `score`     exact-match accuracy of an exported model, with plain transformers
"""
