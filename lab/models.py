"""The public models with random weights, and the trainer's run of them on random data.

Random weights are as much work and memory as trained ones, so nothing is downloaded. bench.py runs
these, and fit.py counts them.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_tiny  # noqa: E402


def parts(model: str) -> SimpleNamespace:
    """UNet and scheduler, as a pipeline names them, and the number of tokens of a caption."""
    if model == "tiny":
        pipe = DiffusionPipeline.from_pretrained(train_tiny.TINY)
        words = pipe.tokenizer.model_max_length
        return SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler, words=words)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if model == "sd15":
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        return SimpleNamespace(unet=unet, scheduler=scheduler, words=77)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return SimpleNamespace(unet=unet, scheduler=scheduler, words=77)


def vae(model: str) -> AutoencoderKL:
    if model == "tiny":
        return DiffusionPipeline.from_pretrained(train_tiny.TINY).vae
    return AutoencoderKL(
        sample_size=512 if model == "sd15" else 1024,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def text_encoders(model: str) -> list[CLIPTextModel]:
    if model == "tiny":
        return [DiffusionPipeline.from_pretrained(train_tiny.TINY).text_encoder]
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    first = CLIPTextModel(CLIPTextConfig(**size, num_hidden_layers=12))
    if model == "sd15":
        return [first]
    size = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
    config = CLIPTextConfig(**size, num_hidden_layers=32, projection_dim=1280)
    return [first, CLIPTextModelWithProjection(config)]


class Run(NamedTuple):
    """What `train_tiny.run` has when the first step begins."""

    config: train_tiny.Config
    unet: UNet2DConditionModel
    reference: Callable | None
    optimizer: torch.optim.Optimizer
    scheduler: DDPMScheduler
    data: train_tiny.Data

    def batches(self, step: int) -> Iterator[dict]:
        return train_tiny.micro_batches(self.data, self.config, step)

    def loss_fn(self, unet: Callable, **batch) -> tuple[Tensor, dict[str, Tensor]]:
        given = {"reference": self.reference, "scheduler": self.scheduler, "beta": self.config.beta}
        return train_tiny.LOSSES[self.config.loss](unet, **given, **batch)

    def change(self, **flags) -> "Run":
        return self._replace(config=replace(self.config, **flags))

    def checkpoint(self, on: bool) -> None:
        switch = "enable" if on else "disable"
        getattr(self.unet, switch + "_gradient_checkpointing")()

    def inputs(self, rows: int) -> dict:
        """What the UNet is called with for so many rows."""
        batch = next(self.change(batch_size=rows).batches(0))
        names = {"encoder_hidden_states", "added_cond_kwargs"} & batch.keys()
        given = {"sample": batch["latents"], "timestep": batch["timesteps"]}
        return given | {name: batch[name] for name in names}

    def steps(self) -> Iterator[dict[str, float]]:
        return train_tiny.train(self.unet, self.optimizer, self.loss_fn, self.batches, self.config)


def random_run(model: str, *flags: str) -> Run:
    """`python train_tiny.py --model MODEL FLAGS`, with random weights and data."""
    config = train_tiny.parse(["--data", "random", "--model", model, *flags])
    with train_tiny.DEVICE:
        pipe = parts(model)
    unet, reference, optimizer = train_tiny.prepare(pipe, config)
    return Run(config, unet, reference, optimizer, pipe.scheduler, random_data(unet, pipe.words))


def random_data(unet: UNet2DConditionModel, words: int, rows: int = 64) -> train_tiny.Data:
    """What `train_tiny.encode` makes of so many pictures, each with a caption of its own."""
    config, side = unet.config, unet.config.sample_size
    conditions = {
        "encoder_hidden_states": torch.randn(rows + 1, words, config.cross_attention_dim).half()
    }
    if config.addition_embed_type:
        time_ids = torch.tensor([[8 * side, 8 * side, 0, 0, 8 * side, 8 * side]] * (rows + 1))
        pooled = torch.randn(rows + 1, 1280).half()
        conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    return train_tiny.Data(
        latents=torch.randn(rows, config.in_channels, side, side).half(),
        losers=None,
        picture=torch.arange(rows),
        caption=torch.arange(1, rows + 1),
        conditions=conditions,
        texts=[],
        num_timesteps=1000,
    )
