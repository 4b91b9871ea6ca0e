"""SUDO (Self-DPO at NeurIPS): preference optimisation of diffusion models without labels.

Equations and tables are those of Peng, Wu, Cheng, Zhao, He: "Self-Supervised Direct Preference
Optimization for Text-to-Image Diffusion Models", NeurIPS 2025 (arXiv 2504.14534 names it SUDO).
S:1065 is line 1065 of the official train.py, github.com/SPengLiang/SUDO at 1e5a282.

Every training image is a winner x_w. Its loser x_l (the paper's x_sl) is another image, paired with
the winner's caption c. Both get the same noise ε at the same timestep t, in the official code
(S:1065-1067; the paper writes ε_w and ε_sl). With the errors

    e_w, e_l   of the policy, the model in training:    e_w = mean (ε_θ(x_w^t, t, c) - ε)²
    r_w, r_l   of the reference, its frozen initial copy

the objective is

    u     = -β/2 · [(e_w - e_l) - (r_w - r_l)]                                             Eq. 8
    L_dpo = mean( -log σ(u) )                                                              Eq. 8
    L     = λ1 · L_dpo + λ2 · mean(e_w)               β = 5000, λ1 = λ2 = 0.5              Eq. 9

DPO compares log-ratios, log p_θ(x|c) / p_ref(x|c). Here -β/2 · (e - r) stands for β times that of
an image, up to a factor per timestep that Diffusion-DPO folds into β, so that u is the winner's
less the loser's. The paper writes squared norms and C = -2500 (section 4.1). That C is -β/2 with
β = 5000, and that errors are means, is the official code's (S:1154, 1137). In this file

    Downgrade(x_w)           is `random_image`, or `blur` or `random_grid`
    x_w^t, x_sl^t            come from `make_pairs`
    |ε - ε_θ(x^t, t, c)|²    is `denoising_error`
    Eq. 8, Eq. 9             are `implicit_margin`, `sudo_objective`; `sudo_loss` is the whole step

The paper's model is a UNet that predicts ε. A UNet or transformer that predicts something else has
another target in e and r, and perhaps other coefficients in x^t = a x + b ε; all else is the same:

    prediction_type     a         b               target
    epsilon             √ᾱ_t      √(1 - ᾱ_t)      ε              Stable Diffusion 1.5, SDXL
    v_prediction        √ᾱ_t      √(1 - ᾱ_t)      a ε - b x      Stable Diffusion 2
    flow matching       1 - t/T   t/T             ε - x          Stable Diffusion 3, Flux

In any trainer of a diffusers UNet (lab/guide.md shows the same for a transformer):

    from sudo import frozen_copy, sudo_loss
    reference = frozen_copy(unet)  # once, before the first step
    # latents: clean and scaled; each one's loser will be another of the batch
    loss, metrics = sudo_loss(unet, reference, noise_scheduler, latents, encoder_hidden_states)
    loss.backward()

Three choices differ from the official code on purpose (lab/fidelity.md lists all differences):

1. No image is its own loser, while S:1018-1027 leaves one per micro-batch in its place on average.
   Where captions repeat, its loser may still have its caption: train_tiny.py's draw forbids that.
2. `pair_weight` can switch the preference term off where the caption was dropped to "", because an
   empty caption favours neither image. The official code prefers the winner there too (S:354).
   With a fifth of the pairs at weight 0, λ1 = 0.5 is 0.4 in effect.
3. Policy and reference run the same arithmetic with fp32 errors, so that u is exactly 0 at the
   start (if both are in eval mode, see `frozen_copy`). The official reference is in half precision
   (S:939, 1149).
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------- the method: a loser, a pair, errors, objective, step


def random_image(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each image another of the batch (S:1018-1027), where the paper has the training set.

    images: (B, ...), pixels or latents. Returns (B, ...): the batch moved along one random cycle,
    so that no image keeps its place and any other is equally likely. Raises ValueError if B = 1.
    """
    if len(images) < 2:
        raise ValueError("a batch of one has no loser: pass losers=, or set drop_last=True")
    device = _random_device(images, generator)
    cycle = torch.randperm(len(images), generator=generator, device=device).to(images.device)
    losers = torch.empty_like(images)
    losers[cycle] = images[cycle.roll(1)]
    return losers


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, scheduler: Any) -> Tensor:
    """x_t = a x_0 + b ε, in fp32; the module's head has a and b.

    latents, noise: (B, ...), such as (B, C, H, W), a video's (B, C, F, H, W) or Flux's packed
    (B, S, D). timesteps: (B,) integers, or for flow matching floats in 0..T, t = σ·T. Returns the
    shape of latents. Raises ValueError for an unfit scheduler, or timesteps of another dtype or
    (where they lie on the CPU) out of range.
    """
    a, b = _coefficients(latents, timesteps, scheduler)
    return a * latents.float() + b * noise.float()


def training_target(latents: Tensor, noise: Tensor, timesteps: Tensor, scheduler: Any) -> Tensor:
    """What the model is to predict, in fp32: ε, v = a ε - b x_0, or the flow's ε - x_0.

    Shapes and ValueError as in `add_noise`.
    """
    prediction_type = _prediction_type(scheduler)
    if prediction_type == "epsilon":
        return noise.float()
    if prediction_type == "flow_prediction":
        return noise.float() - latents.float()
    a, b = _coefficients(latents, timesteps, scheduler)
    return a * noise.float() - b * latents.float()


class Pairs(NamedTuple):
    """What the model sees and should answer, 2B rows: all winners, then their losers in order."""

    noisy: Tensor  # x_t, [2B, ...], of the latents' shape and dtype
    target: Tensor  # ε, v or ε - x_0, [2B, ...] fp32
    timesteps: Tensor  # t, [2B]


def make_pairs(
    scheduler: Any,
    winners: Tensor,
    losers: Tensor,
    *,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Pairs:
    """Give winner and loser the same noise at the same timestep (S:1065-1067).

    scheduler: one of diffusers, with ε- or v-prediction and alphas_cumprod, or of flow matching; T
    is its config.num_train_timesteps. winners, losers: (B, ...) clean scaled latents, as in
    `add_noise`, in the dtype that the model takes. noise: the same shape, ~ N(0, I) if None.
    timesteps: (B,), if None ~ U{0..T-1}, or for flow matching ~ U(0, T). Raises ValueError where a
    shape differs, and as `add_noise`.
    """
    B = len(winners)
    device = _random_device(winners, generator)
    if noise is None:
        noise = torch.randn(winners.shape, generator=generator, device=device)
    if timesteps is None:
        T = scheduler.config.num_train_timesteps
        if _prediction_type(scheduler) == "flow_prediction":
            timesteps = T * torch.rand(B, generator=generator, device=device)
        else:
            timesteps = torch.randint(T, (B,), generator=generator, device=device)
    _expect("losers", losers, winners.shape)
    _expect("noise", noise, winners.shape)
    _expect("timesteps", timesteps, (B,))

    x_0 = torch.cat([winners, losers])  # [2B, ...]
    noise = torch.cat([noise, noise]).to(x_0.device)
    timesteps = torch.cat([timesteps, timesteps])
    noisy = add_noise(x_0, noise, timesteps, scheduler).to(winners.dtype)
    target = training_target(x_0, noise, timesteps, scheduler)
    return Pairs(noisy, target, timesteps.to(x_0.device))


def denoising_error(
    unet: Callable, pairs: Pairs, encoder_hidden_states: Tensor, **unet_kwargs: Any
) -> Tensor:
    """The mean squared error of each row (S:1137): (2B,) fp32, winners first.

    unet: called as unet(noisy, timesteps, encoder_hidden_states, **unet_kwargs) and returns a
    tensor, a tuple or a ModelOutput; a transformer, with its arguments in another order, comes in a
    lambda. The conditions are those of the B winners and are repeated for the losers:
    encoder_hidden_states (B, S, D) and all tensors in unet_kwargs, also inside dicts and lists
    (SDXL's added_cond_kwargs). Raises ValueError for another shape of a condition or a prediction.
    """
    B = len(pairs.timesteps) // 2
    condition = _repeat("encoder_hidden_states", encoder_hidden_states, B)
    unet_kwargs = {name: _repeat(name, value, B) for name, value in unet_kwargs.items()}
    # The reference may be the policy with other weights, whose casts autocast would have kept.
    torch.clear_autocast_cache()
    output = unet(pairs.noisy, pairs.timesteps, condition, **unet_kwargs)
    prediction = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    _expect("the model's prediction", prediction, pairs.target.shape)
    return (prediction.float() - pairs.target).square().flatten(1).mean(1)


def implicit_margin(errors: Tensor, ref_errors: Tensor, beta: float) -> Tensor:
    """u of Eq. 8 (S:1154-1155): (B,), from errors and ref_errors, (2B,) with winners first.

    For one draw of t and ε, σ(u) is the probability that the policy, measured against the
    reference, prefers the winner.
    """
    e_w, e_l = errors.chunk(2)
    r_w, r_l = ref_errors.chunk(2)
    return -beta / 2 * ((e_w - e_l) - (r_w - r_l))


def sudo_objective(
    errors: Tensor,
    ref_errors: Tensor,
    beta: float = 5000.0,
    dpo_weight: float = 0.5,
    mse_weight: float = 0.5,
    pair_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L of Eq. 9 (S:1157-1159) and its metrics.

    errors, ref_errors: (2B,) from `denoising_error`. dpo_weight, mse_weight: λ1, λ2. pair_weight:
    (B,), each pair's weight in the preference term, all 1 if None; 0 where the caption was dropped.
    Raises ValueError where a shape differs.

    Returns L, a scalar, and detached fp32 scalars. Both terms of L are means over all B pairs; the
    metrics are means over those whose weight is not 0, each counted once, and 0 without any. So
    over micro-batches and processes L averages evenly, and a metric weighted by `pairs`:
        pairs            the number of pairs with a preference
        dpo              -log σ(u): ln 2 = 0.6931 at the start
        winner_error     e_w
        loser_error      e_l
        winner_drift     e_w - r_w
        loser_drift      e_l - r_l; both drifts usually rise, and this one more
        margin           u
        implicit_acc     share of u > 0; a tie, u = 0, counts one half
        saturated        share of |u| > 10, where σ(u) is 0 or 1 to four decimals
    """
    if errors.ndim != 1 or len(errors) % 2:
        raise ValueError(f"errors has shape {tuple(errors.shape)}, expected (2B,), winners first")
    B = len(errors) // 2
    _expect("ref_errors", ref_errors, (2 * B,))
    weight = torch.ones_like(errors[:B]) if pair_weight is None else pair_weight.to(errors)
    _expect("pair_weight", weight, (B,))
    e_w, e_l = errors.chunk(2)
    r_w, r_l = ref_errors.chunk(2)
    u = implicit_margin(errors, ref_errors, beta)
    dpo = -F.logsigmoid(u)
    loss = dpo_weight * (weight * dpo).mean() + mse_weight * e_w.mean()

    counted = (weight != 0).float()
    pairs = counted.sum()
    values = {
        "dpo": dpo,
        "winner_error": e_w,
        "loser_error": e_l,
        "winner_drift": e_w - r_w,
        "loser_drift": e_l - r_l,
        "margin": u,
        "implicit_acc": (u > 0).float() + 0.5 * (u == 0),
        "saturated": (u.abs() > 10).float(),
    }
    metrics = {"pairs": pairs}
    for name, value in values.items():
        metrics[name] = (counted * value.detach().float()).sum() / pairs.clamp(min=1)
    return loss, metrics


def sudo_loss(
    unet: Callable,
    reference: Callable | Tensor,
    scheduler: Any,
    latents: Tensor,
    encoder_hidden_states: Tensor,
    *,
    losers: Tensor | None = None,
    beta: float | None = None,
    dpo_weight: float = 0.5,
    mse_weight: float = 0.5,
    pair_weight: Tensor | None = None,
    noise: Tensor | None = None,
    timesteps: Tensor | None = None,
    generator: torch.Generator | None = None,
    **unet_kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The SUDO loss of a batch, to call backward() on, and the metrics of `sudo_objective`.

    unet: the policy, a UNet, or a transformer in a lambda, as in `denoising_error`.
    reference: its `frozen_copy`, or any callable like it (for LoRA the policy with its adapters
        off), or the (2B,) errors that the reference has on these very pairs.
    latents: clean scaled latents of the winners, as in `add_noise`, in the model's dtype.
    encoder_hidden_states: (B, S, D), of their captions.
    losers: shaped like latents; `random_image(latents)` if None, which takes B > 1.
    beta: β; one unit of u is an error difference of 2/β. 5000 if None, but not for flow matching.
    scheduler, noise, timesteps, generator: as in `make_pairs`.
    dpo_weight, mse_weight, pair_weight: as in `sudo_objective`.
    unet_kwargs: further conditions, as in `denoising_error`.

    Raises ValueError where one of them is unfit, and for a reference that is the policy itself.
    """
    if beta is None and _prediction_type(scheduler) == "flow_prediction":
        raise ValueError("flow matching has no default β: pass beta= (see lab/guide.md)")
    beta = 5000.0 if beta is None else beta
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}, expected a positive number")
    if _unwrapped(reference) is _unwrapped(unet):
        raise ValueError("the reference has to be a frozen copy, or the policy with adapters off")
    if losers is None:
        losers = random_image(latents, generator)
    drawn = {"noise": noise, "timesteps": timesteps, "generator": generator}
    pairs = make_pairs(scheduler, latents, losers, **drawn)
    if isinstance(reference, Tensor):
        ref_errors = reference.detach()
    else:
        with torch.no_grad():  # first, so that its activations are freed before the policy's come
            ref_errors = denoising_error(reference, pairs, encoder_hidden_states, **unet_kwargs)
    errors = denoising_error(unet, pairs, encoder_hidden_states, **unet_kwargs)
    return sudo_objective(errors, ref_errors, beta, dpo_weight, mse_weight, pair_weight)


def frozen_copy(unet: torch.nn.Module) -> torch.nn.Module:
    """The reference: the model as it is now, same dtype and device, in eval mode, no gradient.

    Train the policy in eval mode too: in training mode diffusers lays some tensors out otherwise,
    and u starts at rounding error (1e-7 times β). Eval mode silences dropout, LoRA's too, and in
    diffusers before its pull request 9878 gradient checkpointing: train in training mode for these.
    Raises ValueError where a forward was replaced by a function, which the copy would share.
    """
    reference = copy.deepcopy(unet)
    for module, copied in zip(unet.modules(), reference.modules()):
        # A method is bound anew, to the copy. A function stays the same one, with the old model.
        own = getattr(module.forward, "func", module.forward)  # or of a functools.partial
        its = getattr(copied.forward, "func", copied.forward)
        if own == its:
            raise ValueError("the model's forward was replaced by a function: make the copy before")
    return reference.eval().requires_grad_(False)


# ------------------------------------------- the two other downgrades of Table 3


def blur(images: Tensor, factor: int = 4) -> Tensor:
    """Shrink by `factor` and enlarge again (Table 3). images and result: (B, C, H, W) pixels."""
    H, W = images.shape[-2:]
    small = F.interpolate(images, (H // factor, W // factor), mode="bilinear", antialias=True)
    return F.interpolate(small, (H, W), mode="bilinear")


def random_grid(images: Tensor, grid: int = 8, generator: torch.Generator | None = None) -> Tensor:
    """Cut each image into grid x grid cells and swap two of them, drawn anew for each (Table 3).

    images: (B, C, H, W) pixels, as is the result. grid: 2 or more; ValueError if H, W don't divide.
    """
    B, C, H, W = images.shape
    if H % grid or W % grid:
        raise ValueError(f"{H} x {W} pixels do not divide into {grid} x {grid} cells")
    swapped = images.clone(memory_format=torch.contiguous_format)
    after = swapped.view(B, C, grid, H // grid, grid, W // grid)
    before = images.reshape(after.shape)
    device = _random_device(images, generator)
    for i in range(B):
        cells = torch.randperm(grid * grid, generator=generator, device=device)[:2].tolist()
        (y, x), (v, u) = (divmod(cell, grid) for cell in cells)
        after[i, :, y, :, x] = before[i, :, v, :, u]
        after[i, :, v, :, u] = before[i, :, y, :, x]
    return swapped


# ------------------------------------------- small print


def _random_device(images: Tensor, generator: torch.Generator | None) -> torch.device:
    """A generator draws on its own device only; without one, draw where the images are."""
    return images.device if generator is None else generator.device


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile; other wrappers may change it."""
    ddp = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    inner = model.module if ddp else getattr(model, "_orig_mod", None)
    return model if inner is None else _unwrapped(inner)


def _prediction_type(scheduler: Any) -> str:
    """One of "epsilon", "v_prediction" and "flow_prediction". Raises ValueError if none fits."""
    name = getattr(scheduler.config, "prediction_type", None)
    # The FlowMatch schedulers of diffusers give no name, and scale_noise in the place of add_noise.
    flow = name == "flow_prediction" or (name is None and hasattr(scheduler, "scale_noise"))
    if flow and hasattr(scheduler.config, "num_train_timesteps"):
        return "flow_prediction"
    if name in ("epsilon", "v_prediction") and hasattr(scheduler, "alphas_cumprod"):
        return name
    raise ValueError(
        f"{type(scheduler).__name__} with prediction_type {name!r} is not supported: use one with "
        "'epsilon' or 'v_prediction' and alphas_cumprod, or one of flow matching"
    )


def _coefficients(latents: Tensor, timesteps: Tensor, scheduler: Any) -> tuple[Tensor, Tensor]:
    """a and b of x_t = a x_0 + b ε, in fp32, [B, 1, 1, 1] for latents of four dimensions."""
    flow = _prediction_type(scheduler) == "flow_prediction"  # some of these have alphas_cumprod too
    T = scheduler.config.num_train_timesteps
    if not flow and timesteps.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"timesteps has dtype {timesteps.dtype}, expected torch.int64")
    most = T if flow else T - 1  # looked at only on the CPU: a GPU would have to be waited for
    if timesteps.device.type == "cpu" and not ((timesteps >= 0) & (timesteps <= most)).all():
        low, high = timesteps.aminmax()
        raise ValueError(f"timesteps go from {low} to {high}, expected 0 to {most}")
    shape = (-1, *[1] * (latents.ndim - 1))
    if flow:
        sigma = timesteps.to(latents.device, torch.float32).view(shape) / T
        return 1 - sigma, sigma
    alpha = scheduler.alphas_cumprod.to(latents.device, torch.float32)[timesteps].view(shape)
    return alpha.sqrt(), (1 - alpha).sqrt()


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _repeat(name: str, value: Any, batch: int) -> Any:
    """A condition of the B winners, once more for their B losers: [B, ...] -> [2B, ...]."""
    if isinstance(value, dict):
        return {key: _repeat(f"{name}[{key!r}]", item, batch) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_repeat(name, item, batch) for item in value)
    if not isinstance(value, Tensor):
        return value
    _expect(name, value, (batch, *value.shape[1:]))
    return torch.cat([value, value])
