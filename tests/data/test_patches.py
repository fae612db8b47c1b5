"""Images travel as bytes, and become the floats of the model's processor, bit for bit."""

import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ds_moe.data.encode import collate, encode
from ds_moe.data.eval_set import EvalSet
from ds_moe.data.patches import BytePatches, table_of, with_byte_patches
from ds_moe.data.records import read_records
from ds_moe.data.stream import TrainStream
from tests.devices import by_device
from tests.records import chat

QWEN3_VL = {"patch_size": 16, "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PROCESSORS = {
    "Qwen2-VL": Qwen2VLImageProcessorPil(),  # a mean of its own for each channel
    "Qwen3-VL": Qwen2VLImageProcessorPil(**QWEN3_VL, **HALF),
    "not normalised": Qwen2VLImageProcessorPil(**QWEN3_VL, do_normalize=False),
    "one frame": Qwen2VLImageProcessorPil(temporal_patch_size=1, **HALF),
    "GLM-4.5V": Glm4vImageProcessorPil(),
    "GLM-4.6V": Glm46VImageProcessorPil(),
}
SIZES = [(61, 83), (400, 30), (128, 128), (33, 700)]


def noise(seed, width, height):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@by_device
@pytest.mark.parametrize("name", PROCESSORS)
def test_bytes_become_the_floats_of_the_processor(name, device):
    processor, images = PROCESSORS[name], [noise(seed, *size) for seed, size in enumerate(SIZES)]
    made = BytePatches.of(processor)
    expected = processor(images=images, return_tensors="pt")
    found = made(images=images, return_tensors="pt")
    assert found["pixel_values"].dtype == torch.uint8 and found["image_grid_thw"].equal(expected["image_grid_thw"])
    assert expected["pixel_values"].nbytes == found["pixel_values"].nbytes * 4 * made.table.frames
    floats = made.table.floats(found["pixel_values"].to(device))
    assert floats.dtype == torch.float32 and floats.cpu().equal(expected["pixel_values"])


def test_arithmetic_in_fp32_would_not_be_the_processors():
    """Control: a processor multiplies in fp64 and rounds; in fp32 a quarter of all values come out otherwise."""
    table = BytePatches.of(PROCESSORS["Qwen2-VL"]).table
    mean, std = (
        torch.tensor(getattr(PROCESSORS["Qwen2-VL"], name)).unsqueeze(1) for name in ("image_mean", "image_std")
    )
    in_fp32 = (torch.arange(256).float() * torch.tensor(1 / 255) - mean) / std
    assert not torch.equal(in_fp32, table.values_CV) and torch.allclose(in_fp32, table.values_CV, atol=1e-6)


def test_frames_of_their_own_are_not_repeated():
    made = BytePatches.of(PROCESSORS["Qwen2-VL"])
    one = made(images=[noise(0, 56, 56)], return_tensors="pt")["pixel_values"]
    both = one.view(len(one), 3, 1, -1).expand(-1, -1, 2, -1).reshape(len(one), -1)
    assert made.table.floats(both).equal(made.table.floats(one))
    assert made.table.floats(one[:0]).shape == (0, both.shape[1])


class Relative(Qwen2VLImageProcessorPil):
    """Its floats depend on what else an image shows."""

    def normalize(self, image, mean, std, **kwargs):
        return (image - image.mean()).astype(np.float32)


class Other:
    """No processor of transformers."""

    merge_size, patch_size, do_resize = 2, 16, True

    def __call__(self, **arguments):
        raise RuntimeError("not this way")


@pytest.mark.parametrize("processor", [Relative(), Other()])
def test_a_processor_whose_floats_follow_from_more_than_bytes_is_used_as_it_is(processor):
    assert BytePatches.of(processor) is None


@pytest.fixture
def file(folder, write_jsonl):
    """Images in many forms, one, two or none a record."""
    modes = {"RGB": {}, "L": {}, "RGBA": {}, "P": {}, "CMYK": {}}
    names = []
    for number, mode in enumerate(modes):
        image = noise(number, 40 + 13 * number, 60 - 5 * number)
        if mode == "RGBA":
            image.putalpha(
                Image.fromarray(np.arange(image.width * image.height, dtype=np.uint8).reshape(image.size[::-1]))
            )
        names.append(f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        image.convert(mode).save(folder / names[-1])
    records = [{**chat(f"<image> What is {name}?"), "images": [name]} for name in names]
    return write_jsonl([*records, {**chat("<image> or <image>?"), "images": names[:2]}, chat("Hello")])


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"packing": True}])
def test_a_stream_hands_on_bytes_and_a_device_gets_what_the_plain_processor_makes(options, file, run_config, processor):
    config = run_config(file, {"shuffle": False, "length_grouping": False, **options}, global_batch_size=8)
    stream = TrainStream(config, processor, rank=0, world_size=1)
    [step] = islice(stream, 1)
    stream.close()
    records = read_records(str(file), config.data)
    plain = {
        tuple(one.input_ids.tolist()): one
        for one in (encode(records.sample(i), processor, 512, 10**6) for i in range(7))
    }
    seen = 0
    for batch in step:
        assert "pixel_values" not in batch.inputs or batch.inputs["pixel_values"].dtype == torch.uint8
        moved = batch.to(torch.device("cpu"))
        row = [
            moved.inputs["input_ids"][moved.sequence_of_token == one]
            for one in range(moved.samples)
            if moved.real_B[one]
        ]
        encoded = [plain[tuple(ids.tolist())] for ids in row]
        pixels = [one.pixel_values for one in encoded if one.pixel_values is not None]
        assert moved.pixel_table is None and ("pixel_values" in moved.inputs) == bool(pixels)
        if pixels:
            assert moved.inputs["pixel_values"].equal(torch.cat(pixels))
        seen += len(encoded)
        again = moved.to(torch.device("cpu"))  # does nothing more
        assert again.inputs.keys() == moved.inputs.keys()
    assert seen == 7


def test_an_evaluation_gets_them_too(file, run_config, processor):
    config = run_config(file, {"eval": str(file)})
    [first, *_] = EvalSet(config, processor, rank=0, world_size=1).batches()
    assert first.batch.inputs["pixel_values"].dtype == torch.uint8
    for batch in (first.batch, *first.prompts()):
        assert batch.to(torch.device("cpu")).inputs["pixel_values"].dtype == torch.float32


def test_bytes_reach_no_model(file, run_config, processor):
    stream = TrainStream(run_config(file), processor, rank=0, world_size=1)
    batch = next(batch for step in stream for batch in step if "pixel_values" in batch.inputs)
    with pytest.raises(TypeError, match="pixel_values are bytes until the batch is moved to a device"):
        _ = batch.with_labels


def test_bytes_beside_floats_become_floats(file, run_config, processor, text_processor):
    records = read_records(str(file), run_config(file).data)
    in_bytes, in_floats = (
        encode(records.sample(0), one, 512, 10**6) for one in (with_byte_patches(processor), processor)
    )
    assert collate([in_bytes], processor).pixel_table.values_CV.equal(table_of(processor).values_CV)
    mixed, plain = collate([in_bytes, in_floats], processor), collate([in_floats, in_floats], processor)
    assert mixed.pixel_table is None and mixed.inputs["pixel_values"].equal(plain.inputs["pixel_values"])
    with pytest.raises(TypeError, match="another processor"):
        table_of(text_processor)


def test_a_quicker_decoder_would_show_other_pixels():
    """Why JPEG files are decoded whole: libjpeg's reduced sizes (PIL's draft mode) and a reduction before resizing are
    quicker, but what they show is not what the processor resizes to."""
    stream = io.BytesIO()
    noise(0, 800, 600).resize((1600, 1200), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    whole = Image.open(stream)
    exact = np.asarray(whole.convert("RGB").resize((320, 256), Image.Resampling.BICUBIC), dtype=int)
    drafted = Image.open(stream)
    assert isinstance(drafted, ImageFile.ImageFile)
    drafted.draft("RGB", (320, 256))
    assert drafted.size == (400, 300)
    quick = np.asarray(drafted.convert("RGB").resize((320, 256), Image.Resampling.BICUBIC), dtype=int)
    gap = np.asarray(whole.convert("RGB").resize((320, 256), Image.Resampling.BICUBIC, reducing_gap=1.0), dtype=int)
    assert (quick != exact).mean() > 0.5 and (gap != exact).mean() > 0.5
