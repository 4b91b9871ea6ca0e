"""What a trained pipeline shows: whole matches, how its pictures vary, how far its errors moved."""

import random
from statistics import fmean
from unittest import mock

import torch
from PIL import Image

import sudo
import train_tiny
import world


def unconditional_branch_of(reference, pipe):
    """Within it, the reference answers the unconditional half of guidance, the policy the other."""
    policy = pipe.unet.forward

    def forward(noisy, timestep, encoder_hidden_states, **kwargs):
        (empty, noisy), (none, words) = noisy.chunk(2), encoder_hidden_states.chunk(2)
        unconditional = reference(empty, timestep, none, **kwargs)[0]
        return (torch.cat([unconditional, policy(noisy, timestep, words, **kwargs)[0]]),)

    return mock.patch.object(pipe.unet, "forward", forward)


def spread(first: list[Image.Image], second: list[Image.Image]) -> tuple[float, float]:
    """Standard deviation of positions and of sizes between two pictures of the same caption.

    In picture widths, from the captions for which both pictures show two things.
    """
    both = [
        (a.things, b.things)
        for a, b in zip(map(world.read, first), map(world.read, second))
        if len(a.things) == len(b.things) == 2
    ]
    pairs = [(a, b) for things in both for a, b in zip(*things)]
    places = torch.tensor([(a.x - b.x, a.y - b.y) for a, b in pairs])
    sizes = torch.tensor([a.size - b.size for a, b in pairs])
    return tuple((d.square().mean() / 2).sqrt().item() for d in (places, sizes))


@torch.no_grad()
def drift(pipe, reference, split: str) -> dict:
    """How the errors on held-out pairs differ from the reference's, over four draws of t and ε."""
    texts, rng = world.captions(split), random.Random(0)
    scenes = [world.draw(world.place(text, rng)) for text in texts]
    pixels = pipe.image_processor.preprocess(scenes).to(pipe.device)
    latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt(texts, pipe.device, 1, False)
    rng, held_out = train_tiny.generator("held out"), []
    for _ in range(4):
        losers = sudo.random_image(latents, rng)
        noise = torch.randn(latents.shape, generator=rng)
        given = {"noise": noise, "timesteps": torch.randint(1000, (len(texts),), generator=rng)}
        held_out.append(sudo.make_pairs(pipe.scheduler, latents, losers, **given))
    (e_w, e_l), (r_w, r_l) = (
        torch.stack([sudo.denoising_error(unet, pairs, words) for pairs in held_out]).chunk(2, 1)
        for unet in (pipe.unet, reference)
    )
    margin = (e_l - e_w) - (r_l - r_w)
    return {
        "winner_drift": (e_w - r_w).mean().item(),
        "loser_drift": (e_l - r_l).mean().item(),
        "implicit_acc": ((margin > 0).float() + 0.5 * (margin == 0)).mean().item(),
        "typical_difference": (r_l - r_w).abs().median().item(),
    }


def judge(pipe, split: str, scale: str, seed: int) -> tuple[list[float], tuple]:
    """Shares of whole matches and of attributes in two drawings of each caption, and these."""
    texts = world.captions(split)
    judged = [world.judge(pipe, texts, float(scale), again) for again in (seed, seed + 1000)]
    whole, attributes, drawings = zip(*judged)
    return [fmean(whole), fmean(attributes)], drawings


def legible(picture: Image.Image) -> bool:
    """Whether nobody can doubt what it shows: two shapes apart, far from any other two shapes.

    A rounded square of so few pixels can be taken for a circle, and `world.read` has to take sides.
    """

    def distance(scene: world.Scene) -> float:
        """Of the picture from the scene as the world draws it."""
        both = (picture, world.draw(scene, picture.width))
        seen, drawn = (torch.tensor(list(each.tobytes())).float() for each in both)
        return (seen - drawn).square().sum().item()

    scene, others = world.read(picture), []
    if world.caption(scene) is None:
        return False
    for i, thing in enumerate(scene.things):
        for shape in set(world.SHAPES) - {thing.shape}:
            things = [*scene.things[:i], thing._replace(shape=shape), *scene.things[i + 1 :]]
            others.append(distance(scene._replace(things=tuple(things))))
    return distance(scene) < min(others) / 2
