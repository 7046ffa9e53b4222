"""The confusion matrix over two processes is that of one."""

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from unirefiner_hf.evaluation.metrics import ConfusionMatrix

PREDICTIONS = torch.tensor([[0, 1, 2, 2], [1, 1, 0, 2]])
LABELS = torch.tensor([[0, 1, 1, 255], [1, 0, 0, 2]])


def count(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    confusion = ConfusionMatrix(3)
    confusion.update(PREDICTIONS[rank], LABELS[rank])
    confusion.all_reduce()
    torch.save(confusion.matrix, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_count_as_one(tmp_path):
    multiprocessing.spawn(count, args=(str(tmp_path),), nprocs=2)
    whole = ConfusionMatrix(3)
    whole.update(PREDICTIONS, LABELS)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), whole.matrix)
