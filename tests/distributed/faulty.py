"""The command with a fault in it, named by FAULT as ``kind:process:step``.

Kinds: ``kill`` (-9 to the process), ``term`` (SIGTERM to it), ``nan`` (its loss), ``full``
and ``cut`` (its disk, and -9 to it, while a checkpoint is written), ``pickle`` (an optimiser
whose state only DeepSpeed can save), ``none``. The pause
that `datasets` takes when a file's readers end is left out.
"""

import os
import signal
import sys

import datasets

from unirefiner_hf.cli import main
from unirefiner_hf.export.run_folder import random_state_file
from unirefiner_hf.training import checkpoints
from unirefiner_hf.training.trainer import UniRefinerTrainer

kind, process, step = os.environ["FAULT"].split(":")
compute, save = UniRefinerTrainer.compute_loss, checkpoints.save_tree
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


def faulty_loss(self, model, inputs, **options):
    here = self.args.process_index == int(process)
    if here and self.state.global_step == int(step):
        if kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[kind])
        elif kind == "nan":
            inputs["pixel_values"].fill_(float("nan"))
    return compute(self, model, inputs, **options)


def faulty_save(tree, path):
    here = path.name == random_state_file(int(process))
    if here and f"checkpoint-{step}" in str(path):
        if kind == "full":
            raise OSError(28, "No space left on device")
        if kind == "cut":
            os.kill(os.getpid(), signal.SIGKILL)
    save(tree, path)


datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.0
if kind == "pickle":
    checkpoints.is_elementwise = lambda engine: False
UniRefinerTrainer.compute_loss = faulty_loss  # type: ignore[method-assign]
checkpoints.save_tree = faulty_save
sys.exit(main())
