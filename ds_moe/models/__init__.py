"""Model families: from a folder or preset to a model with expert layers of ours.

families.py   what differs between families    load.py      a checked model
presets.py    tiny models                      processor.py tokens and pixels
streaming.py  weights into their places        convert.py   MoE blocks become expert layers
freeze.py     what is not trained              vision.py    ranks without images
lora.py       low-rank updates                 hf_experts.py  our kernels inside plain transformers
"""
