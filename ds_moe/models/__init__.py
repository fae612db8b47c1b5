"""Models of transformers: from a folder or a preset to a model with expert layers of ours.

families.py     all that is known of a model family by name
folder.py       the config in a folder, and folders that no run can train
load.py         a checked model, its config, its outline
presets.py      tiny models built from code
processor.py    tokens and pixels
vl_processors.py those of families with images
images_only.py  what these have in common
image_processors.py pixels to patches, where transformers cannot without torchvision
video_reader.py frames of videos to patches, without torchvision
streaming.py    weights from files to where a rank keeps them
head.py         the output layer where labels are
stored_names.py what files call weights, and what else they hold
ties.py         an output layer that is the input embedding, or is not
blocks.py       finds MoE blocks by what their modules say
convert.py      MoE blocks, or their experts, become our layers
router_forms.py routers of families that ours repeats
hooks.py        what the layers are told of each forward
freeze.py       what a run trains, and what not
matrices.py     what Muon trains of a model
lora.py         low-rank updates
vision.py       ranks without images
attention.py    rows that hold several samples
shared_rows.py  rows that several ranks share
tower.py        how a vision tower computes
generation.py   where a model stops
routing.py      where plain transformers routes otherwise than a run
card.py         the model card of a folder, with the code that loads it
hf_experts.py   our kernels inside plain transformers
"""
