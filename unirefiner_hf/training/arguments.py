"""What a recipe sets: the tower, the images, and the training.

The method's own hyper-parameters are in `unirefiner_hf.methods.settings`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..modeling.registers import FILLS
from ..spurious.settings import require
from .distributed import needs_gloo

QUANTIZATIONS = ("nf4", "int8")
BASE_DTYPES = ("auto", "float32", "bfloat16")
PUBLISHED_BATCH = 16
"""Images a step at which the published learning rate holds."""


@dataclass
class ModelArguments:
    """The tower, its frame and its adapter (LoRA, published: rank 8, alpha 16).

    Raises:
        ValueError: a value is outside its range.
    """

    model: str = field(
        metadata={
            "help": "Hub id or folder of a pre-trained vision tower or dual encoder; "
            "'starter' is the DINOv2-small that comes from PyPI."
        }
    )
    revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model."}
    )
    model_license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the model, for the card. Unset: read from the model's own "
            "card; where that says nothing, the card says unknown."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the model repository's own code. Off unless asked for."},
    )
    keep_text: bool | None = field(
        default=None,
        metadata={
            "help": "Put the base's text tower, projections and tokenizer, unchanged, into "
            "text/ of the merged model, so that it stays a dual encoder. Unset: where the "
            "base has them."
        },
    )
    base_dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the frozen tower; the adapter is trained in float32. "
            "'auto': bfloat16 where bf16 is on, else float32.",
            "choices": list(BASE_DTYPES),
        },
    )
    base_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Keep the frozen layers in fewer bits: 'nf4' (about a quarter of "
            "bfloat16) or 'int8' (half), through bitsandbytes; for small cards. The "
            "merge is into the unquantised base. Unset: not.",
            "choices": list(QUANTIZATIONS),
        },
    )
    teacher_float8: bool = field(
        default=False,
        metadata={
            "help": "Frozen weights multiply in float8 in the passes without gradient "
            "(teacher, relation): faster on GPUs from compute capability 8.9 on, one byte "
            "a weight more. The student stays as it is."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How attention is computed: sdpa, flash_attention_2 (its package has "
            "to be there), eager, ... Unset: transformers chooses, sdpa for every family."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the square the images are resized to, in pixels; a multiple "
            "of the patch size. Unset: the size the tower was trained at."
        },
    )
    final_norm: bool | None = field(
        default=None,
        metadata={
            "help": "Apply the tower's last layer norm to the patch tokens of a family "
            "whose output lacks it. Unset: on for CLIP, as published, and MetaCLIP 2."
        },
    )
    register_factor: int = field(
        default=32,
        metadata={"help": "The frame is max(1, side in patches // this) patches wide."},
    )
    register_fill: str = field(
        default="zero",
        metadata={
            "help": "Pixels of the frame.",
            "choices": list(FILLS),
        },
    )
    inference_register_width: int | None = field(
        default=None,
        metadata={
            "help": "Frame of the published model, in patches; wider than in training "
            "often gives a cleaner map. Unset: as in training."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(
        default=0.1, metadata={"help": "Dropout of the adapter."}
    )

    def __post_init__(self) -> None:
        dtypes, fills = ", ".join(BASE_DTYPES), ", ".join(FILLS)
        size, width = self.image_size, self.inference_register_width
        require(self, "base_dtype", self.base_dtype in BASE_DTYPES, f"one of {dtypes}")
        kinds, kind = ", ".join(QUANTIZATIONS), self.base_quantization
        require(
            self,
            "teacher_float8",
            not (self.teacher_float8 and kind),
            "false where base_quantization is set",
        )
        require(
            self,
            "base_quantization",
            kind is None or kind in QUANTIZATIONS,
            f"one of {kinds}, or unset",
        )
        require(
            self, "image_size", size is None or size >= 1, "at least 1 pixel, or unset"
        )
        require(self, "register_factor", self.register_factor >= 1, "at least 1")
        require(self, "register_fill", self.register_fill in FILLS, f"one of {fills}")
        require(
            self,
            "inference_register_width",
            width is None or width >= 0,
            "0 or more patches, or unset",
        )
        require(self, "lora_rank", self.lora_rank >= 1, "at least 1")
        require(self, "lora_alpha", self.lora_alpha >= 1, "at least 1")
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")


@dataclass
class DataArguments:
    """The unlabelled images.

    Raises:
        ValueError: a value is outside its range.
    """

    data: str = field(
        metadata={
            "help": "A folder of images, a parquet file or folder, a data set saved by "
            "datasets, or a Hub id."
        }
    )
    data_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set."}
    )
    data_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_column: str = field(
        default="image", metadata={"help": "Column that holds the images."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set while training."}
    )
    max_images: int | None = field(
        default=None,
        metadata={"help": "Train on this many images, picked by the seed. Unset: all."},
    )
    reference_image: str | None = field(
        default=None,
        metadata={
            "help": "An image unrelated to all others, whose tokens unmask fixed patterns. "
            "Unset: the one that ships with the package."
        },
    )
    report_images: int = field(
        default=8,
        metadata={"help": "Images of the before/after picture and shares; 0: none."},
    )

    def __post_init__(self) -> None:
        most = self.max_images
        require(self, "max_images", most is None or most >= 1, "at least 1, or unset")
        require(self, "report_images", self.report_images >= 0, "0 or more")


@dataclass
class RefineTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the published defaults of a refinement.

    UniRefiner (arXiv 2605.19622): AdamW, learning rate 1e-4 at a total batch of 16
    scaled linearly, weight decay 0.1, constant schedule, 2 epochs, bf16. Gradient
    clipping is not published: 1.0, the default of transformers. Activation
    checkpointing, where switched on, is the non-reentrant one, its default too.

    Raises:
        ValueError: a value is outside its range, or output_dir is not set.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run. Needed."}
    )
    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "Learning rate at a total batch of 16 (see the next)."},
    )
    scale_learning_rate: bool = field(
        default=True,
        metadata={
            "help": "Scale the learning rate with the total batch: lr * batch / 16."
        },
    )
    weight_decay: float = field(
        default=0.1, metadata={"help": "Weight decay of AdamW."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule."}
    )
    final_lr_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the learning rate that is left at the end; it falls "
            "exponentially, step by step (published for PH-Reg: 0.05). Unset: "
            "lr_scheduler_type."
        },
    )
    num_train_epochs: float = field(
        default=2.0,
        metadata={"help": "Passes over the images, unless max_steps is set."},
    )
    per_device_train_batch_size: int = field(
        default=16, metadata={"help": "Images a step on each device."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    save_steps: float = field(
        default=100, metadata={"help": "Steps between checkpoints."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints kept; the oldest go first."}
    )
    report_to: list[str] = field(  # type: ignore[assignment]
        default_factory=lambda: ["none"],
        metadata={
            "help": "Where metrics go: none, or tensorboard, wandb, trackio, ..."
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Compute in bfloat16. Unset: on GPUs that can, off on CPUs."},
    )
    dataloader_num_workers: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Processes a device that read images beside the step. Unset: up to 4 "
            "with a GPU (one decodes some 90 photographs a second), 0 on CPUs."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept off: the images are the only input."}
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the tower's layers with torch.compile. Slow for the first "
            "two steps, then faster; for GPUs."
        },
    )
    snapshot_steps: int = field(
        default=0,
        metadata={"help": "Steps between PCA pictures in snapshots/. 0: none."},
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Continue the run in output_dir from its last checkpoint; with "
            "push_to_hub and none there, from the one on the Hub."
        },
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is not set: name a folder for the run.")
        if self.fp16:
            raise ValueError(
                "fp16 is not supported: use bf16, which needs no loss scaling."
            )
        if self.push_to_hub and "/" not in (self.hub_model_id or ""):
            raise ValueError(
                f"push_to_hub needs hub_model_id, as user/name; it is {self.hub_model_id!r}."
            )
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError(
                "torch_compile would compile the filters too, which depend on values: use "
                "compile_layers, which compiles the tower's layers."
            )
        require(self, "learning_rate", self.learning_rate > 0, "positive")
        share = self.final_lr_share
        require(
            self,
            "final_lr_share",
            share is None or 0 < share <= 1,
            "in (0, 1], or unset",
        )
        require(self, "snapshot_steps", self.snapshot_steps >= 0, "0 or more")
        require(self, "remove_unused_columns", not self.remove_unused_columns, "false")
        if self.bf16 is None:
            self.bf16 = (
                not self.use_cpu
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported()
            )
        if self.dataloader_num_workers is None:
            gpu = not self.use_cpu and torch.cuda.is_available()
            self.dataloader_num_workers = min(4, os.cpu_count() or 1) if gpu else 0
        if self.ddp_backend is None and needs_gloo():
            self.ddp_backend = "gloo"
        super().__post_init__()


def scaled_learning_rate(learning_rate: float, total_batch: int) -> float:
    """The learning rate for a total batch, linear with the published one at 16."""
    return learning_rate * total_batch / PUBLISHED_BATCH
