"""Pixels are those that inference engines see: PIL's, transparency over white, one image processor everywhere."""

import io
import json

import numpy as np
import pytest
import transformers
from PIL import Image, ImageDraw
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image as transformers_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_moe.data.images import ImageSource, load_image
from ds_moe.errors import UserError
from ds_moe.models.processor import load_processor, save_processor, tiny_processor

SIDE = 32
ORIENTATION = 0x0112  # an EXIF tag


def strokes(alpha: int = 255) -> Image.Image:
    """Black strokes on a transparent ground whose colour, black too, shows where alpha is ignored."""
    image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    ImageDraw.Draw(image).line((4, 4, 27, 27), fill=(0, 0, 0, alpha), width=8)
    return image


def noise() -> Image.Image:
    """Every channel at random, alpha too."""
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA")


def file_of(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def one_colour(form: str, **options) -> bytes:
    """A square whose left half has the one gray value that the file calls transparent."""
    image = Image.new("L", (SIDE, SIDE), 7)
    image.paste(200, (SIDE // 2, 0, SIDE, SIDE))
    return file_of(image.convert(options.pop("mode", "L")), form, **options)


def palette(alpha: bytes) -> bytes:
    image = Image.fromarray((np.arange(SIDE * SIDE) % 4).astype(np.uint8).reshape(SIDE, SIDE), "P")
    image.putpalette([0, 0, 0, 90, 0, 0, 0, 90, 0, 0, 0, 90])
    return file_of(image, "PNG", transparency=alpha)


TRANSPARENT = {
    "RGBA": file_of(strokes(), "PNG"),
    "RGBA, faint": file_of(strokes(100), "PNG"),
    "RGBA, every alpha": file_of(noise(), "PNG"),
    "LA": file_of(strokes().convert("LA"), "PNG"),
    "LA, every alpha": file_of(noise().convert("LA"), "PNG"),
    "palette, one colour": file_of(strokes().quantize(4), "PNG"),
    "palette, alpha for each colour": palette(bytes([0, 80, 160, 255])),
    "gray, one value": one_colour("PNG", transparency=7),
    "RGB, one colour": one_colour("PNG", mode="RGB", transparency=(7, 7, 7)),
    "WEBP": file_of(strokes(), "WEBP", lossless=True),
    "WEBP, lossy": file_of(noise(), "WEBP"),
    "GIF": file_of(strokes(), "GIF"),
    "TIFF": file_of(noise(), "TIFF"),
}


def over_white(data: bytes) -> np.ndarray:
    """By PIL alone."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB"))


def read(data: bytes) -> np.ndarray:
    image = load_image(ImageSource("image", data=data), SIDE * SIDE)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_over_white_bit_for_bit(name):
    data = TRANSPARENT[name]
    assert np.array_equal(read(data), over_white(data))
    assert np.array_equal(read(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))
    assert (over_white(data) == 255).any()  # and white is there to be seen


def test_strokes_are_black_on_white():
    """What the first report said: one colour, 768 of 1,024 pixels differ."""
    pixels = read(TRANSPARENT["RGBA"])
    assert set(pixels.reshape(-1).tolist()) == {0, 255}
    assert np.array_equal(pixels[..., 0] == 0, np.asarray(strokes().getchannel("A")) == 255)


def test_one_transparent_value_of_16_bits():
    values = np.full((SIDE, SIDE), 7 << 8, dtype=np.uint16)
    values[:, 16:] = 200 << 8
    pixels = read(file_of(Image.fromarray(values), "PNG", transparency=7 << 8))
    assert (pixels[:, :16] == 255).all() and (pixels[:, 16:] == 200).all()


def photo() -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (SIDE // 2, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(values)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file_of(photo(), "JPEG", exif=exif)


OPAQUE = {
    "RGB": file_of(photo(), "PNG"),
    "JPEG": file_of(photo(), "JPEG"),
    "CMYK": file_of(photo().convert("CMYK"), "JPEG"),
    "CMYK, TIFF": file_of(photo().convert("CMYK"), "TIFF"),
    "palette": file_of(photo().quantize(16), "PNG"),
    "gray": file_of(photo().convert("L"), "PNG"),
    "opaque RGBA": file_of(photo().convert("RGBA"), "PNG"),
    **{f"orientation {turn}": turned(turn) for turn in range(1, 9)},
}


@pytest.mark.parametrize("name", OPAQUE)
def test_without_transparency_pixels_are_those_of_transformers(name):
    """Negative control: what is opaque is as before, orientation and CMYK included."""
    assert np.array_equal(read(OPAQUE[name]), np.asarray(transformers_image(Image.open(io.BytesIO(OPAQUE[name])))))


# --- the image processor is named


def test_another_image_processor_of_the_library_is_never_taken(tmp_path, monkeypatch):
    """With torchvision installed, AutoProcessor loads the one that resizes with torchvision: other pixels."""
    save_processor(tiny_processor("vl"), tmp_path)

    class Other(Qwen2VLImageProcessorPil):
        pass

    def with_torchvision(*arguments, **options):
        processor = tiny_processor("vl")
        processor.image_processor = Other()
        return processor

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", with_torchvision)
    assert type(load_processor(tmp_path).image_processor) is Qwen2VLImageProcessorPil


@pytest.mark.parametrize("name", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"])
def test_every_name_of_the_processor_gives_the_same_class(tmp_path, name):
    named(tmp_path, name)
    assert type(load_processor(tmp_path).image_processor) is Qwen2VLImageProcessorPil


def test_a_folder_with_another_processor_is_refused(tmp_path):
    named(tmp_path, "CLIPImageProcessor")
    with pytest.raises(UserError, match=r"image_processor_type 'CLIPImageProcessor'.*Qwen2VLImageProcessor") as caught:
        load_processor(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def named(folder, name: str) -> None:
    """A folder of the tiny processor whose images are read by this class."""
    save_processor(tiny_processor("vl"), folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["image_processor_type"] = name
    (folder / "processor_config.json").write_text(json.dumps(config))
