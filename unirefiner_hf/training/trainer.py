"""The trainer: a backbone, images and a method in, a refined checkpoint out."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data.left_out import left_out_lines
from ..data.samples import ToPixels, collate
from ..data.streams import RefinementStream
from ..data.unlabelled import sample_images
from ..errors import UniRefinerError, as_users
from ..export.card import card_from_record, render_card
from ..export.holding import HeldError, holding
from ..export.merge import Merged, merge
from ..export.result_folder import check_card
from ..export.run_folder import (
    ADAPTER,
    ASKED,
    CARD,
    EVALUATION,
    MERGED,
    METRICS,
    PICTURE,
    RECORD,
    SNAPSHOTS,
    STAGING,
    checkpoint_name,
    checkpoint_step,
    is_run,
    is_trained,
    last_checkpoint_step,
    read_record,
)
from ..export.whole import damage, named_steps, newest_whole
from ..hub.push import Pushed, push
from ..hub.sync import HubSync
from ..loading.adapter import CheckpointError
from ..loading.backbone import Model
from ..loading.base_digest import base_sha256
from ..loading.float8 import check_float8, leave_float8
from ..loading.quantized import check_device
from ..methods.base import backbone_arguments, check_arguments, load_trainable
from ..methods.settings import MethodSettings
from ..modeling.modeling_unirefiner import UniRefinerModel
from ..outputs import put_in_place, write_json, write_whole
from ..spurious.settings import FilterSettings
from .arguments import UniRefinerArguments
from .asked_of_run import (
    all_asked,
    check_same,
    found_out,
    identity,
    recipe_of_run,
)
from .before_after import compare, figure
from .callbacks import GracefulStop, RefinementProgress, Snapshots, StepsAsAsked
from .checkpoints import RefinementCheckpoints
from .compiled import compile_layers
from .distributed import (
    LostProcessError,
    batch_seed,
    check_launch,
    fail_together,
    gather_named,
    highest,
    load_whole,
    lost_contact,
    told_by_first,
    wait_for_all,
    wait_long_for_all,
)
from .early import check_early
from .fields import to_words
from .finite import FiniteWeights, Rejections
from .keywords import settle
from .record import finished_record, metrics_of, started_record
from .split import check_split
from .start import (
    RunError,
    build_objective,
    check_method,
    check_not_taken,
    check_places,
    check_state,
    check_together,
    checkpoint_to_resume,
    holds_a_run,
    open_unlabelled,
    reference_pixels,
    set_aside,
    settle_lazy_channels,
    settle_stream,
    use_one_gpu,
)

logger = logging.get_logger(__name__)


class NonFiniteLossError(UniRefinerError, ArithmeticError):
    """A loss term became NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; its message names the checkpoint that was left."""


class UniRefinerTrainer(RefinementCheckpoints):
    """`transformers.Trainer` for the refinement of a vision backbone.

        trainer = UniRefinerTrainer(
            model="facebook/dinov2-base",
            args=UniRefinerArguments("runs/mine", max_steps=75),
            train_dataset=photos,
        )
        trainer.train()
        trainer.save_model("merged")

    What differs from its base:

    - it loads the backbone, adds what the method trains, opens the images, and looks for
      lazy channels before the first step;
    - checkpoints are those of `RefinementCheckpoints`;
    - loss terms, clean ratio and the share each filter rejects are averaged over
      steps and processes and logged with the loss;
    - a loss that is not finite in one process stops all before the weights change, as do
      gradients; so do filters that reject every token, batch after batch;
    - whatever a batch draws (crops, strips, dropout) follows from the seed and the
      batch's place in the run, so it does not matter which process computes it;
    - images the data set had to skip are counted in `skipped`, in every process;
    - `save_model` writes the complete merged checkpoint, which `AutoModel` loads.

    Nothing that is given is changed: arguments and settings are copied, and so is a model
    in memory.

    Args:
        model: Hub id, ``"starter"``, folder, vision model of transformers, or
            `UniRefinerModel`. One in memory is copied here and once more by `save_model`:
            leave its weights as they are until then.
        args: of the run; None: made of the keywords.
        train_dataset: unlabelled images, see `unirefiner_hf.data.unlabelled.open_training_images`.
        method: a name (``"unirefiner"``, ``"ph_reg"``, ``"distillation"``) or settings.
        callbacks: further callbacks of transformers.
        processing_class: image processor of a model in memory; None: from where the model
            was loaded.
        fields: of `UniRefinerArguments` where `args` is None, and of the method's settings
            where `method` is a name.

    Attributes:
        backbone: what the run started from.
        settings: of the method.
        lazy_channels: left out of all cosines.
        skipped: name -> reason of the images that could not be used.
        record: the run's own account, as in ``run.json``.

    Raises:
        UniRefinerError: an argument that is wrong, given twice or not read by the method;
            a folder that holds a run already; images of a form that is not taken; ...
        LaunchError: the launcher started another number of processes.
    """

    args: UniRefinerArguments

    def __init__(
        self,
        model: Model | None = None,
        args: UniRefinerArguments | None = None,
        train_dataset: Any = None,
        method: str | MethodSettings = "unirefiner",
        callbacks: Sequence[TrainerCallback] | None = None,
        *,
        processing_class: BaseImageProcessor | None = None,
        **fields: Any,
    ) -> None:
        args, settings = settle(args, method, fields)
        self.asked = identity(args, settings)
        for name, value in (("model", model), ("train_dataset", train_dataset)):
            if value is None:
                raise RunError(
                    f"{name} is missing: UniRefinerTrainer(..., {name}=...)."
                )
        assert model is not None
        check_arguments(args, settings)
        check_together(args)
        check_launch(args.world_size)
        use_one_gpu(args)
        check_places(model, args)
        self.settings = settings
        run = Path(str(args.output_dir))
        self.resumed, self._damaged = checkpoint_to_resume(run, args)
        self._steps = named_steps(run)
        if self.resumed is not None:
            check_same(self.resumed, self.asked)
        check_method(self.resumed, settings)
        if self.resumed is not None:
            check_split(self.resumed, args)
        check_device(args.base_quantization, args.device)
        if args.teacher_float8:
            check_float8(args.device)
        check_early(train_dataset, args)
        set_seed(args.seed)
        load_whole()
        self._given = (model, processing_class)
        self._asked = all_asked(model, train_dataset, args, settings)
        images = open_unlabelled(train_dataset, args)
        self.backbone = load_trainable(
            model,
            backbone_arguments(args),
            settings,
            bf16=bool(args.bf16),
            processor=processing_class,
        )
        if args.push_to_hub and self.backbone.license is None:
            raise RunError(
                f"The licence of {self.backbone.name} is unknown, and a published model "
                "needs one: look it up and set model_license."
            )
        images.to_pixels = ToPixels(self.backbone.image_size, self.backbone.reading)
        # Each has fetched and read at its own pace.
        wait_long_for_all()
        main = not args.process_index
        base = told_by_first(base_sha256(self.backbone.model) if main else "")
        self.asked |= found_out(base, images, args.reference_image)
        if self.resumed is not None:
            check_same(self.resumed, self.asked)
        self.report = images.report
        for line in self.report.lines():
            logger.warning(line)
        self.reference = reference_pixels(self.backbone, args)
        objective = build_objective(self.backbone, settings, self.reference, args)
        if args.compile_layers:
            compile_layers(self.backbone.model)
        self.lazy_channels = settle_lazy_channels(objective, images, self.resumed)
        self.shown = sample_images(images, args.report_images)
        wait_long_for_all()
        total_batch = args.train_batch_size * args.gradient_accumulation_steps
        self.total_batch = total_batch * args.world_size
        args.learning_rate = args.scaled_learning_rate(self.total_batch)
        if isinstance(images, RefinementStream):
            settle_stream(self.total_batch, args)

        self.skipped: dict[str, str] = {}
        self._rejections = Rejections()
        self.last_metrics: dict[str, float] = {}
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._drawn = (-1, 0)
        self._started = False
        self.objective_type = type(objective)
        with as_users("arguments of the run"):
            super().__init__(
                model=objective,
                args=args,
                train_dataset=images,
                data_collator=collate,
                callbacks=list(callbacks or ()),
            )
        if objective.needs_whole_weights and self.parts_weights:
            raise RunError(
                f"Method {settings.name} exchanges weights of the backbone for the "
                "teacher's, which needs all of them in each process: launch with ddp.yaml "
                "or zero2.yaml in place of ZeRO-3 or FSDP."
            )
        self._add_own_callbacks()
        self.record = started_record(self)

    @classmethod
    def from_run(
        cls,
        run: str | Path,
        model: Model | None = None,
        train_dataset: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        *,
        processing_class: BaseImageProcessor | None = None,
        **fields: Any,
    ) -> UniRefinerTrainer:
        """A trainer that goes on with a run, as its own record tells.

        Args:
            run: its folder.
            model, train_dataset: only where they were in memory, or lie elsewhere now.
            fields: as they were, or of those that change nothing of the weights.

        Raises:
            RunFolderError: no run, or none that tells what it was asked.
            OtherRunError: something differs; names what, as it was and as it is given.
        """
        told = recipe_of_run(run, {name: to_words(v) for name, v in fields.items()})
        return cls(
            told.model if model is None else model,
            told.args,
            told.train_dataset if train_dataset is None else train_dataset,
            told.method,
            callbacks,
            processing_class=processing_class,
        )

    def _add_own_callbacks(self) -> None:
        args, model = self.args, self.backbone.model
        self.graceful_stop = GracefulStop(lambda n: highest(n, self.args.device))
        self.add_callback(self.graceful_stop)
        self.add_callback(StepsAsAsked())
        self.add_callback(FiniteWeights(self.last_good))
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(PrinterCallback if args.disable_tqdm else RefinementProgress)
        if args.push_to_hub:
            self.add_callback(HubSync(args, self.backbone.name))
        if args.snapshot_steps and self.shown:
            width = self.refiner.register_width(*self.backbone.image_size)
            folder = self.folder / SNAPSHOTS
            self.add_callback(
                Snapshots(model, self.shown, width, folder, args.snapshot_steps)
            )

    @property
    def refined(self) -> UniRefinerModel:
        """The register model in training, its adapter not merged."""
        return self.refiner.model

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: bool | str | Path | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Train, and leave adapter, picture, metrics and record in the run's folder.

        Args:
            resume_from_checkpoint: True: the newest checkpoint of the run, if any; or the
                folder of one of its checkpoints. None: as `args.resume` says.
            kwargs: none; those of `transformers.Trainer.train` are refused.

        Raises:
            RunError: it was called before, the folder holds a run by now, or a checkpoint of
                another folder.
            HeldError: another command is at work in the folder.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was left.
            LostProcessError: another process of the run is gone.
            NonFiniteLossError, CheckpointError, ImageError: see there.
        """
        if kwargs:
            raise RunError(f"train() takes no {next(iter(kwargs))}: leave it out.")
        with self.holding(), self._naming_the_lost():
            checkpoint = self._checkpoint(resume_from_checkpoint)
            self._started = True
            wait_for_all()
            if self.is_world_process_zero():
                set_aside(self.folder, self._damaged)
                write_json(self.folder / ASKED, self._asked)
                write_json(self.folder / RECORD, {**self.record, "finished": False})
            self._damaged = ()
            started = time.monotonic()
            output = self._run(checkpoint)
            # One may have uploads to finish.
            wait_long_for_all()
            self._finish(time.monotonic() - started, checkpoint)
            wait_for_all()
        return output

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Keep other commands out of the run's folder; `train` and `save_model` do.

        To be called on every process; the first holds.

        Raises:
            HeldError: another command is at work there; names which.
        """
        with ExitStack() as stack:
            problem = None
            if self.is_world_process_zero():
                try:
                    stack.enter_context(holding(self.folder, "refine"))
                except HeldError as held:
                    problem = held
            fail_together(problem)
            yield

    def _checkpoint(self, asked: bool | str | Path | None) -> Path | None:
        """Where to resume; refuses to start over, or in a folder that was filled meanwhile."""
        steps = named_steps(self.folder)
        if isinstance(asked, (str, Path)):
            folder = Path(asked).absolute()
            inside = folder.parent == self.folder.absolute()
            if not inside or checkpoint_step(folder) not in steps:
                raise RunError(
                    f"resume_from_checkpoint is {asked}, which is no checkpoint-N of this "
                    f"run in {self.folder}."
                )
            problem = damage(folder)
            if problem is not None:
                raise CheckpointError(f"{folder} is not whole: {problem}.")
            return folder
        if asked and steps:
            newest, passed = newest_whole(self.folder)
            self._damaged = tuple(passed)
            return newest
        if self._started:
            raise RunError(
                "train() was called before, and the weights are no longer those of the "
                "start: make another trainer, with another output_dir, or continue from "
                "the last checkpoint, if there is one, by "
                "train(resume_from_checkpoint=True)."
            )
        if asked is False and self.resumed is not None:
            raise RunError(
                "resume_from_checkpoint is False, and resume of the arguments is true: "
                "leave one of them out."
            )
        if steps != self._steps:
            raise holds_a_run(self.folder)
        if self.resumed is None:
            check_not_taken(self.folder)
        return self.resumed

    def _run(self, checkpoint: Path | None) -> TrainOutput:
        self._sums.clear()
        self._drawn = (-1, 0)
        # The order of the images follows the generator, which may have served since.
        set_seed(self.args.seed)
        with self.graceful_stop.watching():
            if checkpoint is not None and self.restore_finished(checkpoint):
                step = self.state.global_step
                output = TrainOutput(step, self.last_metrics.get("loss", 0.0), {})
            else:
                if checkpoint is not None:
                    check_state(checkpoint)
                resume = str(checkpoint) if checkpoint else None
                output = super().train(resume_from_checkpoint=resume)
        if self.graceful_stop.received is not None:
            name = checkpoint_name(last_checkpoint_step(self.folder) or 0)
            raise Interrupted(
                f"Stopped by {self.graceful_stop.received}; {name} was left. Continue with "
                f"--resume {self.folder}."
            )
        return output

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Say of an error in talking to another process what it means, and how to go on.

        Raises:
            LostProcessError: in its place.
        """
        try:
            yield
        except Exception as problem:
            if isinstance(problem, CheckpointError) or not lost_contact(problem):
                raise
            step = last_checkpoint_step(self.folder)
            how = "There is no checkpoint yet. Start again with the same command."
            if step is not None:
                how = (
                    f"{checkpoint_name(step)} is left. Launch again as before, with "
                    f"'refine --resume {self.folder}'; or on other machines and processes, "
                    f"with the accumulation that makes {self.total_batch} images a step."
                )
            reason = " ".join(str(problem).split())[:200]
            raise LostProcessError(
                f"Process {self.args.process_index} lost contact with another after step "
                f"{self.state.global_step}: it was killed, or its machine or the link to it "
                f"is gone. {how} ({reason})"
            ) from problem

    def _finish(self, seconds: float, checkpoint: Path | None) -> None:
        """Adapter, comparison, picture and record.

        Every process takes part in the forward passes, where weights may be split; the
        first writes.
        """
        losses = self.final_metrics()
        skipped = {**self.report.skipped, **gather_named(self.skipped)}
        model = self.refined.eval()
        leave_float8(model)
        width = self.args.inference_register_width
        if width is None:
            width = self.refiner.register_width(*self.backbone.image_size)
        model.config.register_width = width
        resumed = checkpoint is not None
        self.record = finished_record(self, losses, skipped, seconds, resumed)
        self._replace_adapter()
        comparison = None
        if self.shown:
            device, mask = self.args.device, self.refiner.channel_mask
            given = self.settings
            filters = given if isinstance(given, FilterSettings) else FilterSettings()
            comparison = compare(
                model, self.shown, self.reference.to(device), filters, width, mask
            )
            self.record["spurious_shares"] = comparison.shares()
            self.record["spurious_shares"]["images"] = len(self.shown)
        if not self.is_world_process_zero():
            return
        if comparison is not None:
            denormalised = self.backbone.reading.denormalised
            pictures = [denormalised(pixels) for pixels in self.shown]
            drawn = BytesIO()
            figure(comparison, pictures).save(drawn, format="PNG")
            write_whole(self.folder / PICTURE, drawn.getvalue())
        if checkpoint is None or checkpoint_step(checkpoint) != self.state.global_step:
            # What was measured of an earlier end of this run is not true of this one.
            (self.folder / MERGED / EVALUATION).unlink(missing_ok=True)
        write_json(self.folder / METRICS, metrics_of(self))
        self.record["trained"] = True
        write_json(self.folder / RECORD, {**self.record, "finished": False})
        if skipped:
            logger.warning(
                f"{len(skipped)} images could not be used; {RECORD} names each and why. "
                + " ".join(left_out_lines(skipped))
            )

    def _replace_adapter(self) -> None:
        """The adapter in the run's folder, whole; to be called on every process."""
        staging = self.folder / STAGING
        self.save_adapter(staging / ADAPTER)
        if self.args.should_save:
            put_in_place(staging / ADAPTER, self.folder / ADAPTER)
            shutil.rmtree(staging, ignore_errors=True)

    def save_model(  # type: ignore[override]
        self, output_dir: str | Path | None = None, _internal_call: bool = False
    ) -> Merged | None:
        """Write the merged checkpoint, complete: `AutoModel.from_pretrained` loads it.

        The base is loaded once more, in float32, so that the merge is as exact as can be
        and the model in training stays as it is. To be called on every process; the first
        writes.

        Args:
            output_dir: None: ``merged`` in the run's folder. A checkpoint of ours that is
                there is replaced, anything else is not.

        Raises:
            RunError: nothing is trained yet.
            ExportError: see `export_refined`.
        """
        if _internal_call:
            return super().save_model(None if output_dir is None else str(output_dir))
        self._check_finished("save_model")
        merged = None
        with self.holding():
            if self.is_world_process_zero():
                load_whole()
                folder = Path(output_dir) if output_dir else self.folder / MERGED
                merged = merge(self.folder, folder, overwrite=True, **self._source())
                record = read_record(self.folder)
                write_json(self.folder / RECORD, {**record, "finished": True})
                logger.info(f"The refined model is in {folder}.")
            wait_long_for_all()
        return merged

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str | None = None, **options: Any
    ) -> Pushed | None:
        """Publish the run; see `unirefiner_hf.push`. The first process does.

        Args:
            repo_id: ``user/name``; None: `args.hub_model_id`.
            options: of `unirefiner_hf.push`.

        Raises:
            RunError: nothing is trained yet, or no repository is named.
            HubError: see `unirefiner_hf.push`.
        """
        self._check_finished("push_to_hub")
        repo_id = repo_id or self.args.hub_model_id
        if not repo_id:
            raise RunError("push_to_hub needs a repository: push_to_hub('user/name').")
        pushed = None
        if self.is_world_process_zero():
            load_whole()
            options.setdefault("private", bool(self.args.hub_private_repo))
            options.setdefault("token", self.args.hub_token)
            options.setdefault("pictures", self.args.publish_pictures)
            pushed = push(self.folder, repo_id, **{**self._source(), **options})
            logger.info(f"The refined model is at {pushed.url}.")
            for note in pushed.notes:
                logger.warning(note)
        wait_long_for_all()
        return pushed

    def create_model_card(  # type: ignore[override]
        self, output_dir: str | Path | None = None, repo_id: str | None = None
    ) -> Path:
        """Write the model card of the run; a merged checkpoint has one of its own.

        Args:
            output_dir: gets ``README.md``; None: the run's folder.
            repo_id: where the model is on the Hub, for the code a reader pastes.

        Raises:
            RunError: nothing is trained yet.
            ExportError: there is another's card.
        """
        self._check_finished("create_model_card")
        folder = self.folder if output_dir is None else Path(output_dir)
        if self.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            shown = [PICTURE] if (folder / PICTURE).is_file() else []
            card = card_from_record(read_record(self.folder), repo_id=repo_id)
            write_whole(check_card(folder / CARD), render_card(card, shown))
        return folder / CARD

    def _check_finished(self, asked: str) -> None:
        if not (is_run(self.folder) and is_trained(read_record(self.folder))):
            raise RunError(f"{asked}: nothing is trained yet. Call train() first.")

    def _source(self) -> dict[str, Any]:
        """Where the base is loaded from once more."""
        model, processor = self._given
        trust = self.args.trust_remote_code
        return {
            "model": model,
            "processing_class": processor,
            "trust_remote_code": trust,
        }

    # The step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's loss; records its metrics.

        Raises:
            NonFiniteLossError: names the terms that are not finite and the step.
            AllRejectedError: the filters rejected everything, batch after batch.
        """
        self.skipped.update(inputs.get("skipped", ()))
        if isinstance(self.train_dataset, RefinementStream):
            self.train_dataset.note(inputs["position"])
        self._seed_batch()
        progress = self.state.global_step / max(1, self.state.max_steps)
        outputs = model(pixel_values=inputs["pixel_values"], progress=progress)
        self._stop_unless_finite(outputs)
        for name in self.objective_type.METRICS:
            if name in outputs:
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + outputs[name].detach().float(), count + 1)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; a stream comes shared out already, and knows where it is."""
        stream = self.train_dataset
        if not isinstance(stream, RefinementStream):
            return super().get_train_dataloader()
        stream.endless = True
        stream.batch = self.args.train_batch_size
        self.args.ignore_data_skip = True
        args = self.args
        workers = min(args.dataloader_num_workers, stream.shards)
        return DataLoader(
            stream,
            batch_size=args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            multiprocessing_context=args.dataloader_multiprocessing_context
            if workers
            else None,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """As in `Trainer`; with `final_lr_share`, an exponential fall to it."""
        optimizer = optimizer or self.optimizer
        share = self.args.final_lr_share
        if share is None or optimizer is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        steps = max(1, num_training_steps)
        self.lr_scheduler = LambdaLR(
            optimizer, lambda step: share ** min(1.0, step / steps)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _seed_batch(self) -> None:
        step, micro = self._drawn
        micro = micro + 1 if step == self.state.global_step else 0
        self._drawn = self.state.global_step, micro
        args = self.args
        place = self.state.global_step * args.gradient_accumulation_steps + micro
        place = place * args.world_size + args.process_index
        torch.manual_seed(batch_seed(args.seed, place))

    def _stop_unless_finite(self, outputs: dict[str, Tensor]) -> None:
        names = [
            name
            for name in ("loss", *self.objective_type.LOSS_TERMS)
            if name in outputs
        ]
        values = torch.stack([outputs[name].detach().float() for name in names])
        finite = bool(torch.isfinite(values).all())
        rejected = self._rejections.too_many(outputs)
        worst = highest(int(rejected) if finite else 2, values.device)
        if not worst:
            return
        if worst == 1:
            raise self._rejections.error(self.state.global_step + 1, outputs)
        if finite:
            raise NonFiniteLossError(
                f"Step {self.state.global_step + 1}: a loss of another process is not "
                f"finite. The weights were not updated. {self.last_good()}"
            )
        broken = [
            f"{name} = {value}"
            for name, value in zip(names, values.tolist(), strict=True)
            if value != value or value in (float("inf"), float("-inf"))
        ]
        raise NonFiniteLossError(
            f"Step {self.state.global_step + 1}: {', '.join(broken)}. The weights were not "
            f"updated. {self.last_good()} Lower the learning rate, or train in float32."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics' means since the last log, over all processes."""
        if "loss" in logs and self._sums:
            logs.update(self._mean_metrics())
            self._sums.clear()
        if self.skipped:
            logs["skipped_images"] = float(len(self.skipped))
        self.last_metrics.update(
            (name, value)
            for name, value in logs.items()
            if name in ("loss", *self.objective_type.METRICS)
        )
        super().log(logs, start_time)

    def final_metrics(self) -> dict[str, float]:
        """Last logged loss and metrics; steps since then are averaged in their place.

        To be called on every process.
        """
        if self._sums:
            self.last_metrics.update(self._mean_metrics())
        return dict(self.last_metrics)

    def _mean_metrics(self) -> dict[str, float]:
        names = list(self._sums)
        means = torch.stack([total / n for total, n in self._sums.values()])
        means = self.accelerator.reduce(means, reduction="mean")
        return dict(zip(names, means.tolist(), strict=True))

    def planned_steps(self) -> int:
        """Optimiser steps of the whole run."""
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        batches = len(self.get_train_dataloader())
        an_epoch = math.ceil(batches / self.args.gradient_accumulation_steps)
        return math.ceil(self.args.num_train_epochs * max(1, an_epoch))

    # The Hub: `HubSync` uploads whole checkpoints, without the base class's pickles

    def init_hf_repo(
        self, token: str | None = None, private: bool | None = None
    ) -> None:
        """Nothing: `HubSync` has made the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `HubSync` uploads when the checkpoint is whole."""
