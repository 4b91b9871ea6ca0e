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
    run = bench.random_run(model, flags + " --batch-size 2 --grad-accum 3")
    before = [p.clone() for p in run.unet.parameters()]  # which the first two rows do not change
    seen = [0, 0]  # pictures without a gradient, and with one

    def count(unet, pictures):
        seen[torch.is_grad_enabled()] += len(pictures[0])

    run.unet.register_forward_pre_hook(count)
    if isinstance(run.reference, torch.nn.Module):
        run.reference.register_forward_pre_hook(count)
    bench.step_of(run, arrange, whole)()
    assert seen == ([0, 6] if "sft" in row else [12, 12])  # with the losers, by both models
    assert all(map(torch.equal, run.unet.parameters(), before)) == (row in [*bench.ROWS][:2])


def test_the_official_arrangement_is_sudo_from_pixels(small):
    run = bench.random_run("sd15", "--lora 0 --batch-size 3")
    loss_fn, batches = bench.official(run)
    with mock.patch.object(run.pipe.vae, "encode", wraps=run.pipe.vae.encode) as encode:
        _, metrics = loss_fn(run.unet, **next(batches(0)))
    winners, losers = encode.call_args.args[0].sum((1, 2, 3)).chunk(2)
    assert sorted(winners.tolist()) == sorted(losers.tolist())  # the same in some order
    assert metrics["dpo"].item() == pytest.approx(0.6931, abs=1e-3)


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
    measured = ["reset_peak_memory_stats", *["synchronize"] * 4, "max_memory_allocated"]
    assert [call[0] for call in cuda.mock_calls] == measured * 12
    bench.on_a_cpu("sd15", rounds=1)
    assert capsys.readouterr().out.splitlines()[2].endswith("| 1.00 |")


def test_the_models_have_the_weights_of_the_public_ones(monkeypatch):
    monkeypatch.setattr(train_tiny, "DEVICE", torch.device("meta"))
    for model, unet in {"sd15": 859.52, "sdxl": 2567.46}.items():  # millions
        with train_tiny.DEVICE:
            pipe = bench.pipeline(model)
        parts = pipe.unet, pipe.vae, pipe.text_encoder
        assert [round(part.num_parameters() / 1e6, 2) for part in parts] == [unet, 83.65, 123.06]


def test_a_gpu_that_is_too_small_for_all_weights_gets_lora():
    page = Path(__file__).with_name("cost.md").read_text(encoding="utf-8")
    counts = re.findall(r"All weights of (\w+), by the flags of its recipe: ([\d.]+) GB", page)
    needed = {"tiny": 0} | {model: round(float(GB)) for model, GB in counts}
    for model in train_tiny.RECIPES:
        assert train_tiny.parse(["--data", "none", "--model", model]).memory == needed[model]
