"""A learned gate over LoRA adapters: which one serves a request."""
