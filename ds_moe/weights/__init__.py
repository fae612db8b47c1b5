"""Weights in safetensors files.

files.py     folders of shards     rows.py     a few rows at a time
layouts.py   how stacked experts are stored    unread.py   parameters whose values are still in their files
"""
