"""Tests of ds_moe/gating."""
