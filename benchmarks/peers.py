"""The other side of the comparison, in PyTorch.

diffusers' UNet2DModel with the same weights, its schedulers, and a plain loop.
"""

import copy
import dataclasses
import tempfile

import diffusers
import numpy as np
import torch

from ddpm_jax.config import Config
from ddpm_jax.weights.diffusers import write_diffusers

VARIANTS = ("eager", "channels_last", "compile")
"""The ways to run the network in PyTorch. On a GPU, compile uses channels_last too, as users do."""

diffusers.utils.logging.set_verbosity_error()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peer:
    """The network of `config` with `params`, run as one of VARIANTS."""

    def __init__(self, config: Config, params, variant: str, dtype: str, train: bool = False):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="array"))
        with tempfile.TemporaryDirectory() as folder:
            write_diffusers(f"{folder}/model", config, params)
            unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="model/unet")
        self.unet = unet.to(DEVICE)
        self.config = config
        self.dtype = getattr(torch, dtype)
        self.train = train
        self.format = torch.contiguous_format
        if variant == "channels_last" or (variant == "compile" and DEVICE == "cuda"):
            self.format = torch.channels_last
        self.unet.to(memory_format=self.format)
        for name, module in self.unet.named_modules():
            if name.endswith("dropout"):  # A diffusers folder does not store the dropout rate.
                module.p = config.model.dropout
        self.unet.train(train)
        if not train:  # Faster than autocast, which only training needs, for its float32 weights.
            self.unet.to(self.dtype)
        self.call = torch.compile(self.unet) if variant == "compile" else self.unet

    def denoise(self, x, t):
        """The network's output for x [B,C,H,W] and t [B]."""
        with torch.autocast(DEVICE, self.dtype, enabled=self.train and self.dtype != torch.float32):
            return self.call(x, t).sample

    def images(self, array):
        """Images [B,H,W,C] as [B,C,H,W] on the device, in the dtype and format of the variant."""
        x = torch.from_numpy(np.array(array).transpose(0, 3, 1, 2))
        x = x.to(DEVICE, None if self.train else self.dtype)
        return x.contiguous(memory_format=self.format)


def forward(peer: Peer, x, t):
    """The network's output for x [B,H,W,C] and t [B]."""
    x = peer.images(x)
    t = torch.from_numpy(np.array(t)).to(DEVICE)

    @torch.inference_mode()
    def call():
        return peer.denoise(x, t).float().cpu().numpy().transpose(0, 2, 3, 1)

    return call


def training(peer: Peer, images):
    """One update of Algorithm 1 on uint8 images [B,H,W,C].

    With Adam, gradient clipping and an average of the weights, as in the config.
    """
    optim = peer.config.optim
    parameters = list(peer.unet.parameters())
    averages = [copy.deepcopy(parameter.detach()) for parameter in parameters]
    adam = torch.optim.Adam(parameters, optim.learning_rate, fused=True)
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02)

    def call():
        x_0 = peer.images(images).float() / 127.5 - 1
        if peer.config.data.flip:
            flip = torch.rand(len(x_0), device=DEVICE) < 0.5
            x_0 = torch.where(flip[:, None, None, None], x_0.flip(3), x_0)
        t = torch.randint(0, 1000, (len(x_0),), device=DEVICE)
        noise = torch.randn_like(x_0)
        output = peer.denoise(scheduler.add_noise(x_0, noise, t), t).float()
        loss = torch.nn.functional.mse_loss(output, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - optim.ema_decay)
        return loss.item()

    return call


def reverse(peer: Peer, batch: int, steps: int):
    """`steps` steps of the reverse chain with the library's DDPMScheduler."""
    start = _noise(peer, batch)
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, variance_type="fixed_large")
    scheduler.set_timesteps(1000)

    @torch.inference_mode()
    def call():
        x = start
        for t in scheduler.timesteps[:steps]:
            x = scheduler.step(peer.denoise(x, t.to(DEVICE)), t, x).prev_sample
        return _wait(x)

    return call


def plain_reverse(peer: Peer, batch: int, steps: int):
    """The same, as people write it themselves.

    Tables in float32, a gather in each step, x_{t-1} from the predicted noise.
    """
    start = _noise(peer, batch)
    beta = torch.linspace(1e-4, 0.02, 1000, device=DEVICE)
    alpha = 1 - beta
    alpha_bar = torch.cumprod(alpha, 0)

    def gather(table, t):
        return table.gather(0, t).view(-1, 1, 1, 1).to(start.dtype)

    @torch.inference_mode()
    def call():
        x = start
        for i in range(steps):
            t = torch.full((batch,), 999 - i, dtype=torch.long, device=DEVICE)
            of_noise = (1 - gather(alpha, t)) / (1 - gather(alpha_bar, t)).sqrt()
            mean = (x - of_noise * peer.denoise(x, t)) / gather(alpha, t).sqrt()
            x = mean + gather(beta, t).sqrt() * torch.randn_like(x)
        return _wait(x)

    return call


def sample(peer: Peer, n: int, steps: int):
    """uint8 images [n,H,W,C] by the library's DDIMPipeline."""
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02)
    pipeline = diffusers.DDIMPipeline(peer.unet, scheduler)
    pipeline.unet = peer.call
    pipeline.set_progress_bar_config(disable=True)

    def call():
        images = pipeline(batch_size=n, num_inference_steps=steps, output_type="pt").images
        return (images.float().permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()

    return call


def _noise(peer: Peer, batch: int):
    shape = (batch, *peer.config.data.image_shape)
    return peer.images(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))


def _wait(x):
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return x
