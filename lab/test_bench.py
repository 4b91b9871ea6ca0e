"""Each row of bench.py runs the passes that it names, and cost.md has the trainer's thresholds."""

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

import bench
import train_tiny


@pytest.fixture
def small(monkeypatch):
    """The parts of tiny-sd stand in for those of any model. The recipe is still the model's."""
    real = bench.pipeline
    monkeypatch.setattr(bench, "pipeline", lambda model: real("tiny"))


@pytest.mark.parametrize("row, model", [(r, m) for r in bench.ROWS for m in ("tiny", "sd15")])
def test_a_step_of_a_row_runs_its_passes(small, row, model):
    flags, arrange, whole = bench.ROWS[row]
    run = bench.random_run(model, flags + " --batch-size 2 --grad-accum 3")  # 12 with losers
    before = [p.clone() for p in run.unet.parameters()]  # which the first two rows do not change
    seen = [0, 0, 0]  # pictures without a gradient, with one, and in the VAE

    def count(module, pictures):
        place = 2 if module is run.pipe.vae.encoder else int(torch.is_grad_enabled())
        seen[place] += len(pictures[0])

    for module in (run.unet, run.reference, run.pipe.vae.encoder):
        if isinstance(module, torch.nn.Module):
            module.register_forward_pre_hook(count)
    bench.step_of(run, arrange, whole)()
    assert seen == ([0, 6, 0] if "sft" in row else [12, 12, 12 * (row == bench.OFFICIAL)])
    assert all(map(torch.equal, run.unet.parameters(), before)) == (row in [*bench.ROWS][:2])


def test_a_table_of_a_gpu_and_one_of_a_cpu(small, monkeypatch, capsys):
    cuda = mock.Mock()
    cuda.max_memory_allocated.side_effect = [3e9] * 11 + [torch.OutOfMemoryError]
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    clock = mock.Mock(perf_counter=iter(range(999)).__next__)  # a step takes a second
    with mock.patch.multiple(bench, CUDA=True, BATCHES=(1, 2), MICRO_BATCHES=2, time=clock):
        bench.on_a_gpu("sd15")
    out = capsys.readouterr().out
    assert out.count("| 500.0 | 250.0 |") == out.count("| 3.0 | 3.0 |") == len(bench.ROWS) - 1
    assert f"| {bench.OFFICIAL} | 500.0 | - |" in out
    bench.on_a_cpu("sd15", rounds=1)
    assert capsys.readouterr().out.splitlines()[2].endswith("| 1.00 |")


def test_the_models_are_as_large_as_the_public_ones_and_the_thresholds_are_those_of_cost_md():
    page = Path(__file__).with_name("cost.md").read_text(encoding="utf-8")
    needs = dict(re.findall(r"all weights of (\w+) need a card of ([\d.]+) GB", page))
    for model, millions in {"sd15": "859.52", "sdxl": "2567.46"}.items():
        config = train_tiny.parse(["--data", "none", "--model", model])
        assert config.memory == round(float(needs[model]))
        with torch.device("meta"), mock.patch.object(train_tiny, "DEVICE", torch.device("meta")):
            unet = bench.pipeline(model).unet
        assert f"{unet.num_parameters() / 1e6:.2f}" == millions and millions in page
