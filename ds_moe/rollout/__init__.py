"""Completions from an inference engine, for reinforcement.

engine.py   what a run asks of any engine: prompts, completions, weights handed over
"""
