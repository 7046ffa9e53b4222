"""What the image processor of a NaFlex backbone gives is taken, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Siglip2ImageProcessorPil

from tests.conftest import make_tiny_tower
from unirefiner_hf import UniRefinerBackbone, UniRefinerModel
from unirefiner_hf.errors import UniRefinerError

PROCESSOR = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=24)


def photograph(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )
    return Image.fromarray(values)


def test_patches_are_put_together_again():
    tower = make_tiny_tower("siglip2_vision_model")
    model = UniRefinerModel.from_tower(tower, register_width=0)
    inputs = PROCESSOR([photograph(30, 40), photograph(30, 40)], return_tensors="pt")
    rows, columns = inputs["spatial_shapes"][0].tolist()
    with torch.no_grad():
        found = model(**inputs)
        expected = tower(**inputs).last_hidden_state[:, : rows * columns]
    assert found.feature_map.shape == (2, 32, rows, columns) and rows != columns
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    framed = UniRefinerModel.from_tower(tower, register_width=1)(**inputs)
    assert framed.feature_map.shape == found.feature_map.shape
    backbone = UniRefinerBackbone.from_tower(tower, register_width=0)
    assert backbone(**inputs).feature_maps[-1].shape == found.feature_map.shape


def test_images_of_several_shapes_are_refused():
    model = UniRefinerModel.from_tower(make_tiny_tower("siglip2_vision_model"))
    inputs = PROCESSOR([photograph(30, 40), photograph(40, 30)], return_tensors="pt")
    with pytest.raises(UniRefinerError, match="spatial_shapes holds 2 shapes"):
        model(**inputs)
    with pytest.raises(UniRefinerError, match="pixel_values has shape"):
        model(torch.zeros(1, 3, 8, 8), spatial_shapes=torch.tensor([[2, 2]]))
    with pytest.raises(UniRefinerError, match="patches without their grid"):
        model(inputs["pixel_values"])


def test_another_tower_takes_no_shapes():
    model = UniRefinerModel.from_tower(make_tiny_tower("dinov2"))
    with pytest.raises(UniRefinerError, match="spatial_shapes is of NaFlex towers"):
        model(torch.zeros(1, 3, 8, 8), spatial_shapes=torch.tensor([[2, 2]]))
