"""The model card of a folder for plain transformers: its head, and how the model in it is loaded and asked.

Plain transformers cannot build the processor of images, text and videos where torchvision is missing: its video half
needs it. Therefore the card of such a model has a second snippet, which puts the parts together.
"""

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_moe.models.families import family_of

# What both snippets that read images have in common. The image processor is the one a run was trained with: the
# torchvision one resizes to other pixels.
_MODEL = """\
folder = "."  # this folder, or its name on the hub
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")  # device_map="auto": on accelerators
image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # resizes images as in training"""

_ASK = """\
content = [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

_WITH_TORCHVISION = f"""\
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

{_MODEL}
processor = AutoProcessor.from_pretrained(folder)
processor.image_processor = image_processor

{_ASK}"""

_TORCHVISION_ALONE = f"""\
from transformers import AutoProcessor, CLASS

folder = "."  # this folder, or its name on the hub
model = CLASS.from_pretrained(folder, dtype="auto")  # device_map="auto": on accelerators
processor = AutoProcessor.from_pretrained(folder)

{_ASK}"""

_WITHOUT_TORCHVISION = f"""\
import re

from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.image_utils import load_image

{_MODEL}
tokenizer = AutoTokenizer.from_pretrained(folder)

content = [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]
pixels = image_processor([load_image("picture.png")], return_tensors="pt").to(model.device)
text = tokenizer.apply_chat_template(
    [{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=False
)
pad, merged = tokenizer.decode(model.config.image_token_id), image_processor.merge_size**2
sizes = iter((pixels["image_grid_thw"].prod(-1) // merged).tolist())  # tokens of each image, in order
text = re.sub(re.escape(pad), lambda match: pad * next(sizes), text)
inputs = tokenizer(text, return_tensors="pt").to(model.device)
inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
output = model.generate(**inputs, **pixels, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

_TEXT_ONLY = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")  # device_map="auto": on accelerators
tokenizer = AutoTokenizer.from_pretrained(folder)

messages = [{"role": "user", "content": "What is a mixture of experts?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def model_card(title: str, config: PretrainedConfig, about: str) -> str:
    """The text of the file; `about` says where the model comes from, in Markdown."""
    family = family_of(config)
    if family.vision is None:
        known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        usage = _fenced(_TEXT_ONLY if known else _TEXT_ONLY.replace("AutoModelForCausalLM", family.class_name))
    elif not family.from_parts:
        usage = f"""\
`AutoProcessor` needs torchvision, which resizes images to pixels that differ a little from those of training:

{_fenced(_TORCHVISION_ALONE.replace("CLASS", family.class_name))}"""
    else:
        usage = f"""\
With torchvision:

{_fenced(_WITH_TORCHVISION)}

Without torchvision `AutoProcessor` fails, because it would also build a processor of videos. The same from its parts:

{_fenced(_WITHOUT_TORCHVISION)}"""
    return f"""---
library_name: transformers
tags: [ds_moe]
---
# {title}

{about.strip()}

## Use it
{usage}
"""


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
