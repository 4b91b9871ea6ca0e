"""The snippets of lab/fidelity.md and lab/README.md do what these pages say of them."""

import copy
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch.testing import assert_close

import compare  # noqa: F401  (puts the top of the repository on the path)
import sudo
import test_sudo
from test_sudo import B, batch

LAB = Path(__file__).parent


def tiny_transformer(name):
    """SD3's, Flux's or Wan's, its latents, its conditions and what has no batch axis."""
    torch.manual_seed(0)
    size = {"num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
    channels, text = {"in_channels": 4, "out_channels": 4}, {"joint_attention_dim": 64}
    if name == "Wan":
        model = WanTransformer3DModel(text_dim=64, freq_dim=16, ffn_dim=32, **size, **channels)
        return model, torch.randn(B, 4, 2, 8, 8), {}, {}
    pooled = {"pooled_projections": torch.randn(B, 10)}
    text["pooled_projection_dim"] = 10
    if name == "SD3":
        place = {"sample_size": 8, "pos_embed_max_size": 4, "caption_projection_dim": 24}
        model = SD3Transformer2DModel(**place, **size, **channels, **text)
        return model, torch.randn(B, 4, 8, 8), pooled, {}
    rope = {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4), "guidance_embeds": True}
    model = FluxTransformer2DModel(in_channels=16, **rope, **size, **text)
    ids = {"img_ids": torch.rand(16, 3), "txt_ids": torch.zeros(5, 3)}
    return model, torch.randn(B, 16, 16), pooled | {"guidance": torch.ones(B)}, ids


def snippet(page):
    (block,) = re.findall(r"^```python\n(.*?)^```$", (LAB / page).read_text("utf-8"), re.M | re.S)
    return block


def test_a_transformer_of_videos_starts_at_ln_2():
    wan, latents, condition, _ = tiny_transformer("Wan")
    scheduler, words = FlowMatchEulerDiscreteScheduler(), torch.randn(B, 5, 64)
    models = wan, sudo.frozen_copy(wan)
    loss, metrics = sudo.sudo_loss(*models, scheduler, latents, words, beta=9.0, **condition)
    assert metrics["dpo"] == torch.tensor(2.0).log() and metrics["margin"] == 0
    loss.backward()
    assert sum(p.grad.abs().sum() for p in wan.parameters() if p.grad is not None) > 0


@pytest.mark.parametrize("name, unit", [("SD3", 1), ("Flux", 1000)])
def test_the_snippet_for_transformers(name, unit):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    transformer, latents, condition, ids = tiny_transformer(name)
    reference, seen = sudo.frozen_copy(transformer), {}
    transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(kwargs, out=out.sample), with_kwargs=True
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prompts, pooled = batch().conditions.bfloat16(), condition["pooled_projections"].bfloat16()
    names = {"torch": torch, "noise_scheduler": scheduler, "accelerator": accelerator}
    names |= {"transformer": transformer, "reference": reference, "model_input": latents}
    names |= {"prompt_embeds": prompts, "pooled_prompt_embeds": pooled, "sudo_loss": sudo.sudo_loss}
    if name == "SD3":
        exec(snippet("fidelity.md"), names)
        loss, metrics = names["loss"], names["metrics"]
        assert set(seen["timestep"].tolist()) <= set(scheduler.timesteps.tolist())
    else:  # what the comment of the snippet says of Flux
        exec(snippet("fidelity.md").split("# For Flux")[0], names)
        unets = [names["as_unet"](model, unit, **ids) for model in (transformer, reference)]
        with accelerator.autocast():
            given = (scheduler, latents, prompts)
            loss, metrics = sudo.sudo_loss(*unets, *given, beta=9.0, **condition)
    t = seen["timestep"] * unit
    assert torch.equal(t[:B], t[B:]) and 1 < t.min() and t.max() <= 1000
    # The error of the winners by ε - x = (x_t - x) / σ, from what the transformer saw.
    sigma = (t[:B] / 1000).view(B, *[1] * (latents.ndim - 1))
    error = seen["out"][:B] - (seen["hidden_states"][:B] - latents) / sigma
    mse = error.square().mean().detach()
    assert_close(metrics["winner_error"], mse, rtol=1e-2, atol=0)
    assert metrics["margin"] == 0 and loss.requires_grad


def test_the_snippet_for_sampling_takes_the_unconditional_branch_from_the_reference(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(LAB / "tiny-sd")
    reference = pipe.unet
    reference.save_pretrained("sft/unet")
    pipe.unet = policy = test_sudo.moved(reference)
    policy = copy.deepcopy(policy)
    pipe.save_pretrained("out2")
    exec(snippet("README.md").replace('"cuda"', '"cpu"'), names := {})
    assert names["picture"].size == (32, 32)
    # A pipeline stacks the unconditional half first, then that of the caption.
    x, words = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 64)
    mixed = names["pipe"].unet(x, 500, encoder_hidden_states=words, return_dict=False)[0]
    both = [unet(x, 500, words).sample[i] for i, unet in enumerate((reference, policy))]
    assert_close(mixed, torch.stack(both), rtol=1e-4, atol=1e-5)
    assert (mixed[1] - reference(x, 500, words).sample[1]).abs().max() > 0.01
