"""Tests of ds_moe/tasks/gate."""
