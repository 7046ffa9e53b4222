"""The counts of a step without data beside those of a real one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

from benchmarks.memory_check import Case, allocated_bytes, estimated_bytes
from tests.conftest import ALL_FAMILIES, FAMILIES, make_tiny_tower
from unirefiner_hf.estimation import dry_run
from unirefiner_hf.estimation.dry_run import dry_step
from unirefiner_hf.loading.lora import add_adapter
from unirefiner_hf.loading.unlocked import UnlockedTower, unlocked_names
from unirefiner_hf.methods import objective as scopes
from unirefiner_hf.methods.distillation.settings import DistillationSettings
from unirefiner_hf.methods.objective import Surroundings
from unirefiner_hf.methods.ph_reg.settings import PHRegSettings
from unirefiner_hf.methods.unirefiner.settings import UniRefinerSettings
from unirefiner_hf.modeling.modeling_unirefiner import UniRefinerModel

aten = torch.ops.aten
FLASH = "_scaled_dot_product_flash_attention"
SIZE, BATCH = 32, 2


def tiny_model(family, attention):
    tower = make_tiny_tower(family)
    tower.set_attn_implementation(attention)
    model = UniRefinerModel.from_tower(tower)
    model.tower = add_adapter(tower, rank=4)
    return model


def counted_step(model, settings, checkpointing=False, progress=1.0):
    """Operations of a real step, by PyTorch's own counter."""
    given = Surroundings(torch.randn(1, 3, SIZE, SIZE), 32, torch.ones(3))
    objective = settings.objective().build(model, settings, given).train()
    if checkpointing:
        objective.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    objective.prepare(SIZE, SIZE)
    counter = FlopCounterMode(display=False)
    for ending in ("", "_backward"):
        # The counter does not know PyTorch's own attention kernel for CPUs.
        known = counter.flop_registry[getattr(aten, f"{FLASH}{ending}")]
        counter.flop_registry[getattr(aten, f"{FLASH}_for_cpu{ending}")] = known
    with counter:
        objective(torch.randn(BATCH, 3, SIZE, SIZE), progress)["loss"].backward()
    return counter.get_total_flops()


def without_data(model, settings, **options):
    options = {"image_size": SIZE, "batch": BATCH, "as_on_gpu": False, **options}
    return dry_step(model, settings, **options)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("dinov2", "eager"), *((family, "sdpa") for family in ALL_FAMILIES)],
)
def test_operations_are_those_of_a_real_step(family, attention):
    settings = UniRefinerSettings(ah_layers=[0, 1])
    first = without_data(tiny_model(family, attention).to("meta"), settings)
    # Tensors that a tower keeps between calls must not pass from one to the other.
    real = counted_step(tiny_model(family, attention), settings)
    again = without_data(tiny_model(family, attention).to("meta"), settings)
    assert first.total_flops == again.total_flops == real


def test_recomputation_is_counted_apart():
    settings = UniRefinerSettings()
    plain = without_data(tiny_model("dinov2", "sdpa").to("meta"), settings)
    model = tiny_model("dinov2", "sdpa").to("meta")
    again = without_data(model, settings, checkpointing=True)
    real = counted_step(tiny_model("dinov2", "sdpa"), settings, checkpointing=True)
    assert again.total_flops == real
    recomputed = sum(again.flops.pop(dry_run.RECOMPUTATION).values())
    assert again.flops == plain.flops
    student = sum(plain.flops[scopes.STUDENT].values())
    assert 0.5 * student < recomputed <= student


def test_passes_are_told_with_their_images_and_tokens():
    model = tiny_model("dinov2_with_registers", "sdpa").to("meta")
    cost = without_data(model, UniRefinerSettings(no_grad_batch=4))
    # 8 x 8 patches, a strip of 2, a frame of 1 and of 4, 1 + 4 prefix tokens.
    assert cost.images == {
        scopes.COMPOSITES: 6,
        scopes.FULL_IMAGE: 2,
        scopes.STUDENT: 2,
        scopes.RELATION: 6,
    }
    assert cost.calls[scopes.COMPOSITES] == 2
    assert cost.tokens[scopes.COMPOSITES] == 6 * (8 * 10 + 5)
    assert cost.tokens[scopes.STUDENT] == 2 * (10 * 10 + 5)
    assert cost.tokens[scopes.RELATION] == 6 * (16 * 16 + 5)


def test_before_scd_there_is_no_relation_pass():
    model = tiny_model("dinov2", "sdpa").to("meta")
    cost = without_data(model, UniRefinerSettings(), progress=0.0)
    assert scopes.RELATION not in cost.flops
    real = counted_step(
        tiny_model("dinov2", "sdpa"), UniRefinerSettings(), progress=0.0
    )
    assert cost.total_flops == real


def test_the_baseline_is_counted_as_it_is():
    settings = DistillationSettings()
    real = counted_step(tiny_model("dinov2", "sdpa"), settings)
    cost = without_data(tiny_model("dinov2", "sdpa").to("meta"), settings)
    assert cost.total_flops == real
    assert cost.images[scopes.CROPS] == cost.images[scopes.RELATION] == 6
    assert cost.images[scopes.FULL_IMAGE] == 2
    assert cost.flops[scopes.LOSSES] and scopes.COMPOSITES not in cost.flops


@pytest.mark.parametrize("family", FAMILIES)
def test_ph_reg_is_counted_as_it_is(family):
    settings = PHRegSettings(teacher_views=3)

    def unlocked():
        tower = make_tiny_tower(family)
        tower.set_attn_implementation("sdpa")
        model = UniRefinerModel.from_tower(tower, num_register_tokens=4)
        model.tower = UnlockedTower(tower, unlocked_names(tower))
        return model

    real = counted_step(unlocked(), settings)
    model = unlocked().to("meta")
    cost = without_data(model, settings)
    assert cost.total_flops == real
    assert cost.images[scopes.VIEWS] == 6 and cost.images[scopes.STUDENT] == 2
    prefix = model.family.num_prefix_tokens(model.config.vision_config)
    patches = (SIZE // 4) ** 2
    assert cost.tokens[scopes.VIEWS] == 6 * (patches + prefix)
    assert cost.tokens[scopes.STUDENT] == 2 * (patches + prefix + 4)
    assert cost.trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_mixed_precision_halves_the_tower_and_leaves_the_losses():
    model = tiny_model("dinov2", "sdpa").to("meta")
    model.tower.get_base_model().to(torch.bfloat16)
    cost = without_data(
        model, UniRefinerSettings(), autocast=torch.bfloat16, as_on_gpu=True
    )
    for part in {*scopes.PASSES} - {scopes.CROPS, scopes.VIEWS}:
        assert set(cost.flops[part]) == {torch.bfloat16}
    assert set(cost.flops[scopes.LOSSES]) == {torch.float32}


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 4}
MEMORY = {
    "dinov2": Case(Dinov2Config(patch_size=8, **SMALL), 64, 4, [1, 2]),
    "recomputed": Case(Dinov2Config(patch_size=8, **SMALL), 64, 4, None, True),
    "clip": Case(
        CLIPVisionConfig(intermediate_size=128, patch_size=8, **SMALL),
        64,
        2,
        no_grad_batch=6,
    ),
    "siglip, eager": Case(
        SiglipVisionConfig(intermediate_size=128, patch_size=8, **SMALL),
        64,
        2,
        attention="eager",
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_what_the_allocator_held(name):
    case = MEMORY[name]
    assert estimated_bytes(case) == pytest.approx(allocated_bytes(case), rel=0.15)
