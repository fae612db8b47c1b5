"""Weights in safetensors files; what a model family calls them is handed in.

files.py     the one reader and the one writer, folders of shards
layouts.py   how files store experts, and a weight's rows from files of any layout
unread.py    parameters whose values are still in their files
"""
