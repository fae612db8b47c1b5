"""The fixtures of tests/records.py."""

from tests.records import folder, processor, run_config, text_processor, write_jsonl

__all__ = ["folder", "processor", "run_config", "text_processor", "write_jsonl"]
