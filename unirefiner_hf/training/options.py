"""What a recipe says of the training where we differ from transformers; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated


@dataclass
class TrainingOptions:
    """Fields of `UniRefinerArguments` that are ours, or whose default is."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the run. Needed."}
    )
    learning_rate: Annotated[float, "(0, inf)"] = field(
        default=1e-4,
        metadata={"help": "Learning rate at a total batch of 16 (see the next)."},
    )
    scale_learning_rate: bool = field(
        default=True,
        metadata={
            "help": "Scale the learning rate with the total batch: lr * batch / 16."
        },
    )
    weight_decay: Annotated[float, "[0, inf)"] = field(
        default=0.1, metadata={"help": "Weight decay of AdamW."}
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning-rate schedule."}
    )
    final_lr_share: Annotated[float | None, "(0, 1]"] = field(
        default=None,
        metadata={
            "help": "Share of the learning rate that is left at the end; it falls "
            "exponentially, step by step (published for PH-Reg: 0.05). Unset: "
            "lr_scheduler_type."
        },
    )
    num_train_epochs: Annotated[float, "(0, inf)"] = field(
        default=2.0,
        metadata={"help": "Passes over the images, unless max_steps is set."},
    )
    per_device_train_batch_size: Annotated[int, "[1, inf)"] = field(
        default=16,
        metadata={"help": "Images a step on each device."},
    )
    logging_steps: Annotated[float, "(0, inf)"] = field(
        default=10, metadata={"help": "Steps between logs."}
    )
    save_steps: Annotated[float, "(0, inf)"] = field(
        default=100,
        metadata={"help": "Steps between checkpoints."},
    )
    save_total_limit: Annotated[int | None, "[1, inf)"] = field(
        default=2,
        metadata={"help": "Checkpoints kept; the oldest go first."},
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
    dataloader_num_workers: Annotated[int | None, "[0, inf)"] = field(  # type: ignore[assignment]
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
    snapshot_steps: Annotated[int, "[0, inf)"] = field(
        default=0,
        metadata={"help": "Steps between PCA pictures in snapshots/. 0: none."},
    )
    publish_pictures: bool = field(
        default=False,
        metadata={
            "help": "With push_to_hub, publish before_after.png too: it shows images of the "
            "training set."
        },
    )
    resume: bool = field(
        default=False,
        metadata={
            "help": "Continue the run in output_dir from its last checkpoint; with "
            "push_to_hub and none there, from the one on the Hub."
        },
    )
    allow_pickled_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Let resume read an optimiser's state that DeepSpeed or FSDP pickled. A "
            "pickle can run anything: only for checkpoints you wrote yourself. Never "
            "fetched from the Hub."
        },
    )
    ddp_timeout: Annotated[int, "[1, 2147483647]"] = field(
        default=600,
        metadata={
            "help": "Seconds after which a process that does not answer is lost, and the run "
            "ends with a message. A link may be cut for as long."
        },
    )
