"""What a trained pipeline shows: whole matches, how its pictures vary, how far its errors moved."""

import random
from statistics import fmean
from unittest import mock

import torch

import sudo
import train_tiny
import world


def unconditional_branch_of(reference, pipe):
    """Within it, the reference answers the unconditional half of guidance, the policy the other."""
    policy = pipe.unet.forward

    def forward(noisy, timestep, encoder_hidden_states, **kwargs):
        noisy_empty, noisy = noisy.chunk(2)
        empty, words = encoder_hidden_states.chunk(2)
        unconditional = reference(noisy_empty, timestep, empty, **kwargs)[0]
        return (torch.cat([unconditional, policy(noisy, timestep, words, **kwargs)[0]]),)

    return mock.patch.object(pipe.unet, "forward", forward)


def judge(pipe, split: str, scale: str, seed: int) -> tuple[list[float], tuple]:
    """Shares of whole matches and of attributes in two drawings of each caption, and these."""
    texts = world.captions(split)
    judged = [world.judge(pipe, texts, float(scale), again) for again in (seed, seed + 1000)]
    whole, attributes, drawings = zip(*judged)
    return [fmean(whole), fmean(attributes)], drawings


def spread(first: list, second: list) -> tuple[float, float]:
    """Standard deviations of places and of sizes, in picture widths, between two drawings."""
    scenes = [(world.read(a).things, world.read(b).things) for a, b in zip(first, second)]
    # Of the captions for which both pictures show two things.
    pairs = [pair for a, b in scenes if len(a) == len(b) == 2 for pair in zip(a, b)]
    places = torch.tensor([(a.x - b.x, a.y - b.y) for a, b in pairs])
    sizes = torch.tensor([a.size - b.size for a, b in pairs])
    return tuple((d.square().mean() / 2).sqrt().item() for d in (places, sizes))


@torch.no_grad()
def drift(pipe, reference, split: str) -> dict:
    """How the errors on held-out pairs differ from the reference's, over four draws of t and ε."""
    texts = world.captions(split)
    placing = random.Random(0)
    scenes = [world.draw(world.place(text, placing)) for text in texts]
    pixels = pipe.image_processor.preprocess(scenes).to(pipe.device)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt(texts, pipe.device, 1, False)
    rng = train_tiny.generator("held out")
    held_out = []
    for _ in range(4):
        losers = sudo.random_image(latents, rng)
        noise = torch.randn(latents.shape, generator=rng)
        given = {"noise": noise, "timesteps": torch.randint(1000, (len(texts),), generator=rng)}
        held_out.append(sudo.make_pairs(pipe.scheduler, latents, losers, **given))
    error = sudo.denoising_error
    e_w, e_l = torch.stack([error(pipe.unet, pairs, words) for pairs in held_out]).chunk(2, 1)
    r_w, r_l = torch.stack([error(reference, pairs, words) for pairs in held_out]).chunk(2, 1)
    margin = (e_l - e_w) - (r_l - r_w)
    return {
        "winner_drift": (e_w - r_w).mean().item(),
        "loser_drift": (e_l - r_l).mean().item(),
        "implicit_acc": ((margin > 0).float() + 0.5 * (margin == 0)).mean().item(),
    }
