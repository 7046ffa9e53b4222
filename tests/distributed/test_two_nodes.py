"""The document's commands on two machines, in short; `benchmarks.two_nodes` is the long form."""

from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch.distributed as dist
import yaml

from benchmarks import two_nodes
from unirefiner_hf.training.distributed import connect_cpus

VALUES = {"num_processes": "2", "config": "c", "data": "d", "output_dir": "o"}


def test_the_document_has_a_command_for_each_way():
    commands = two_nodes.commands()
    assert commands.keys() == {"ddp", "zero2"}
    for text in commands.values():
        filled = two_nodes.filled_in(text, 1, VALUES)
        assert "export MACHINE=1" in filled and "--num_processes 2" in filled
        assert "--config c --data d --output_dir o" in filled
        assert f"--main_process_ip {two_nodes.ADDRESSES[0]}" in filled
        assert f"GLOO_SOCKET_IFNAME={two_nodes.LINK}" in filled
    with pytest.raises(ValueError, match="0 places.*--no_such"):
        two_nodes.filled_in(text, 1, {"no_such": "x"})


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_starts_on_several_machines_without_pdsh(stage):
    """Accelerate's default would start the others by itself, over ssh."""
    file = two_nodes.ROOT / "recipes" / "accelerate" / f"zero{stage}.yaml"
    settings = yaml.safe_load(file.read_text())["deepspeed_config"]
    assert settings["deepspeed_multinode_launcher"] == "standard"


def test_the_timeout_holds_on_cpus(monkeypatch):
    """transformers reads `ddp_timeout` with GPUs only: torch's half an hour would hold."""
    made = {}
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **options: made.update(options)
    )
    connect_cpus(60)
    assert not made
    launched = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**launched, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    connect_cpus(60)
    assert made == {"timeout": timedelta(seconds=60)}


def test_two_machines_survive_a_cut_and_end_without_one_another(tmp_path):
    stack = ExitStack()
    try:
        machines = stack.enter_context(two_nodes.two_machines())
    except two_nodes.Unavailable as problem:
        pytest.skip(f"network namespaces cannot be made here: {problem}")
    with stack:
        values = two_nodes.make_inputs(tmp_path, timeout=30)
        it = two_nodes.Rehearsal("ddp", machines, tmp_path, values, limit=150)
        it.one_machine()
        assert it.cut("cut", "checkpoint-5", 3)
        assert it.difference("one-machine", "cut") == 0
        assert it.lost("gone", "checkpoint-5", silently=True) < 60
        assert "lost contact" in it.message("gone")
        assert f"refine --resume {tmp_path / 'gone'}" in it.message("gone")
        it.resumed("gone")
        assert it.difference("one-machine", "gone") == 0
