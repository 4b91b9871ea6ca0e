"""The snippets of lab/guide.md do what the page says of them."""

import copy
import re
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict
from torch.testing import assert_close

import compare  # noqa: F401  (puts the top of the repository on the path)
from test_sudo import B, batch, moved, sdxl_unet, tiny_unet

GUIDE = Path(__file__).with_name("guide.md").read_text("utf-8")


def snippet(line):
    """The python block of the page that has this line."""
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.M | re.S)
    return next(block for block in blocks if line in block)


def adapted(unet):
    """The UNet with adapters that do something, of scale 1, since a file holds no alpha."""
    policy = copy.deepcopy(unet).requires_grad_(False)
    policy.add_adapter(LoraConfig(r=8, target_modules=["to_q"], init_lora_weights=False))
    return policy.eval()


def same_model(unet, other):
    b = batch()
    given = b.winners, b.draws["timesteps"], b.conditions
    assert_close(unet(*given).sample, other(*given).sample, rtol=0, atol=1e-5)


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return diffusers.DiffusionPipeline.from_pretrained(Path(__file__).with_name("tiny-sd"))


@pytest.fixture
def names():
    """What a reader's trainer has by the time that it comes to a snippet."""
    b = batch()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    given = {"accelerator": accelerator, "global_step": 0, "model_input": b.winners}
    given |= {"noise_scheduler": diffusers.DDPMScheduler(), "prompt_embeds": b.conditions}
    return given | {"unet_added_conditions": b.added}


def test_adapters_go_into_the_pipeline_that_they_belong_to_or_are_merged_for_new_ones(pipe):
    pipe.save_pretrained("my-sft")
    policy = adapted(pipe.unet)
    for folder in ("my-sudo/step-000200", "my-sft-lora"):
        pipe.save_lora_weights(folder, get_peft_model_state_dict(policy))
    names = {}
    exec(snippet("load_lora_weights"), names)
    same_model(names["pipe"].unet, policy)
    exec(snippet("unload_lora"), {"unet": pipe.unet})
    pipe.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q"]))  # whose product is 0 at first
    same_model(pipe.unet, policy)


@pytest.mark.parametrize("kind", [tiny_unet, sdxl_unet])
def test_the_unconditional_branch_comes_from_the_reference(pipe, monkeypatch, kind):
    reference = kind()
    reference.save_pretrained("my-sft/unet")
    policy = moved(reference)
    pipe = MagicMock()
    pipe.to.return_value.unet = copy.deepcopy(policy)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda folder: pipe)
    names = {}
    exec(snippet("policy = pipe.unet.forward").replace('"cuda"', '"cpu"'), names)
    b = batch()
    given = {"encoder_hidden_states": b.conditions, "added_cond_kwargs": b.added}
    models = reference, policy, names["pipe"].unet
    empty, words, both = (unet(b.winners, 500, return_dict=False, **given)[0] for unet in models)
    assert_close(both, torch.cat([empty[: B // 2], words[B // 2 :]]), rtol=1e-4, atol=1e-5)


def test_the_snippet_for_lora_also_where_the_unet_is_wrapped(names):
    (last,) = re.findall(r"arguments of\s`sudo_loss` after the scheduler are `([^`]*)`", GUIDE)
    call = f"sudo_loss(unet, reference, noise_scheduler, {last})"
    names["unet"] = torch.nn.DataParallel(adapted(sdxl_unet()))  # hides the adapters as DDP does
    exec(snippet(".disable_adapters()"), names)
    torch.manual_seed(3)
    loss, metrics = eval(call, names)
    names |= {"unet": adapted(sdxl_unet()), "reference": sdxl_unet().eval()}
    torch.manual_seed(3)
    expected, _ = eval(call, names)
    assert_close(loss, expected)
    assert metrics["margin"] != 0 and loss.requires_grad


SIZE = {"num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
SIZE |= {"joint_attention_dim": 64, "pooled_projection_dim": 10}
SD3 = {"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 4, "caption_projection_dim": 24}
FLUX = {"num_single_layers": 1, "axes_dims_rope": (4, 4, 4), "guidance_embeds": True}


@pytest.mark.parametrize("flux", [False, True])
def test_the_snippets_for_transformers(names, flux):
    if flux:
        transformer = diffusers.FluxTransformer2DModel(in_channels=16, **FLUX, **SIZE).eval()
    else:
        transformer = diffusers.SD3Transformer2DModel(sample_size=8, **SD3, **SIZE).eval()
    seen = {}
    transformer.register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = scheduler.timesteps[::300]
    names |= {"transformer": transformer, "noise_scheduler": scheduler, "timesteps": t}
    names |= {"pooled_prompt_embeds": torch.randn(B, 10), "guidance": torch.ones(B)}
    names |= {"latent_image_ids": torch.rand(16, 3), "text_ids": torch.zeros(5, 3)}
    names["FluxPipeline"] = diffusers.FluxPipeline
    exec(snippet("def as_unet("), names)
    loop = snippet("as_unet(transformer)")
    if flux:  # "for the first two"
        loop = snippet("_pack_latents") + "".join(loop.splitlines(keepends=True)[2:])
    exec(loop, names)
    assert_close(seen["timestep"], torch.cat([t, t]) / (1000 if flux else 1))
    assert names["metrics"]["margin"] == 0 and names["loss"].requires_grad
