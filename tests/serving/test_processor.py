"""What vLLM's processor makes of pictures and adapters, without a server."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from vllm.config import ModelConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media.image import ImageMediaIO
from vllm.plugins import load_general_plugins

from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.serving.vllm import register
from monkey_model.serving.vllm_pictures import _PictureIO
from monkey_model.training.peft_model import BASE_WEIGHTS
from tests.serving.test_server import HARBOUR, deep_png, io, png, rotated_jpeg


def alpha_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (50, 30), (200, 10, 10, 77)).save(file, "PNG")
    return file.getvalue()


def cmyk_jpeg() -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(HARBOUR)).resize((90, 60)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor(checkpoint):
    load_general_plugins()
    return MULTIMODAL_REGISTRY.create_processor(ModelConfig(str(checkpoint), dtype="bfloat16"))


def process(processor, *pictures):
    items = processor.info.parse_mm_data({"image": list(pictures)})
    return processor("<img></img>" * len(pictures) + " Answer: ", items)


READERS = {
    "monkey serve": lambda data: _PictureIO().load_bytes(data),
    "vllm serve": lambda data: ImageMediaIO().load_bytes(data),
    "Pillow": lambda data: Image.open(io.BytesIO(data)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", [rotated_jpeg, deep_png, alpha_png, cmyk_jpeg])
def test_crops_are_those_of_the_image_processor(processor, checkpoint, make, reader):
    data = make()
    expected = MonkeyImageProcessor.from_pretrained(checkpoint)([HARBOUR, data])["pixel_values"]
    inputs = process(processor, READERS[reader](HARBOUR), READERS[reader](data))
    for item, crops in zip(inputs["mm_kwargs"]["image"], expected, strict=True):
        assert item["pixel_values"].data.dtype == torch.float32
        assert torch.equal(item["pixel_values"].data, crops)


def test_a_picture_is_known_by_its_bytes(processor):
    def name(data):
        return process(processor, _PictureIO().load_bytes(data))["mm_hashes"]["image"][0]

    assert name(HARBOUR) == name(bytes(HARBOUR)) != name(png("red"))


def test_settings_of_a_request_are_refused(processor):
    items = processor.info.parse_mm_data({"image": [_PictureIO().load_bytes(HARBOUR)]})
    with pytest.raises(ValueError, match=r"mm_processor_kwargs must be empty.*got grid"):
        processor("<img></img>", items, hf_processor_mm_kwargs={"grid": [4, 4]})


def test_an_adapter_with_other_weights_is_refused(adapter, tmp_path):
    load_general_plugins()
    register()  # twice is once
    assert PEFTHelper.from_local_dir(str(adapter), None).r == 4
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / BASE_WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"must hold LoRA alone; got {BASE_WEIGHTS}"):
        PEFTHelper.from_local_dir(str(tmp_path / "adapter"), None)
