"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020) on 8x8 digits, in one file.

python examples/minimal.py [STEPS]    trains (3000 steps: minutes on a laptop), draws minimal.pgm
"""

import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
digits = jnp.load(Path(__file__).parent.parent / "ddpm_jax/data/digits.npz")
images = digits["images"] / 127.5 - 1  # [1797, 8, 8, 1] in [-1, 1]

# Sections 2 and 4: the variances, [T,1,1,1]. log1p and expm1 keep digits that float32 would lose.
T = 1000
betas = jnp.linspace(1e-4, 0.02, T)[:, None, None, None]  # t = 0 means "diffused for one step".
log_alphas_bar = jnp.cumsum(jnp.log1p(-betas), axis=0)
sqrt_alphas_bar = jnp.exp(log_alphas_bar / 2)
sqrt_one_minus_alphas_bar = jnp.sqrt(-jnp.expm1(log_alphas_bar))


class Block(nn.Module):  # Appendix B: a residual block with the time embedding as an input.
    width: int

    @nn.compact
    def __call__(self, x, temb):
        h = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(8)(x)))
        h = h + nn.Dense(self.width)(temb)[:, None, None, :]
        h = nn.swish(nn.GroupNorm(8)(h))
        h = nn.Conv(self.width, (3, 3), kernel_init=nn.initializers.zeros)(h)
        return h + (x if x.shape[-1] == self.width else nn.Dense(self.width)(x))


class UNet(nn.Module):  # Appendix B: predicts the noise in x_t. Here 8x8 and 4x4, attention at 4x4.
    width: int = 32

    @nn.compact
    def __call__(self, x, t):
        angles = t[:, None] * jnp.exp(-jnp.linspace(0, jnp.log(10000.0), self.width // 2))[None, :]
        temb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        temb = nn.swish(nn.Dense(4 * self.width)(nn.swish(nn.Dense(4 * self.width)(temb))))
        h = nn.Conv(self.width, (3, 3))(x)
        skip = Block(self.width)(h, temb)
        h = nn.Conv(self.width, (3, 3), strides=2)(skip)
        h = Block(2 * self.width)(h, temb)
        pixels = nn.GroupNorm(8)(h).reshape(len(h), 16, -1)
        h = h + nn.MultiHeadDotProductAttention(1)(pixels).reshape(h.shape)
        h = Block(2 * self.width)(h, temb)
        h = nn.Conv(self.width, (3, 3))(h.repeat(2, axis=1).repeat(2, axis=2))
        h = Block(self.width)(jnp.concatenate([h, skip], axis=-1), temb)
        h = nn.swish(nn.GroupNorm(8)(h))
        return nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros)(h)


def loss_fn(params, rng, x_0):  # Algorithm 1, Eq. 14
    t = jax.random.randint(jax.random.fold_in(rng, 0), (len(x_0),), 0, T)
    eps = jax.random.normal(jax.random.fold_in(rng, 1), x_0.shape)
    x_t = sqrt_alphas_bar[t] * x_0 + sqrt_one_minus_alphas_bar[t] * eps  # Eq. 4
    return jnp.mean((network.apply(params, x_t, t) - eps) ** 2)


@jax.jit
def train_step(params, ema, opt_state, step):
    batch_key, rng = jax.random.split(jax.random.fold_in(jax.random.key(0), step))
    x_0 = jax.random.choice(batch_key, images, (32,))
    loss, gradient = jax.value_and_grad(loss_fn)(params, rng, x_0)
    updates, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    return params, optax.incremental_update(params, ema, 0.005), opt_state, loss


@jax.jit
def sample(params, rng):  # Algorithm 2
    def step(x_t, t):  # Eq. 11
        eps = network.apply(params, x_t, jnp.full(len(x_t), t))
        mean = (x_t - betas[t] / sqrt_one_minus_alphas_bar[t] * eps) / jnp.sqrt(1 - betas[t])
        z = jax.random.normal(jax.random.fold_in(rng, t), x_t.shape) * (t > 0)
        return mean + jnp.sqrt(betas[t]) * z, None

    x_T = jax.random.normal(jax.random.fold_in(rng, T), (16, 8, 8, 1))
    return jax.lax.scan(step, x_T, jnp.arange(T), reverse=True)[0]


network = UNet()
optimizer = optax.adam(2e-3)
params = ema = network.init(jax.random.key(1), images[:1], jnp.zeros(1))
opt_state = optimizer.init(params)
for step in range(STEPS):
    params, ema, opt_state, loss = train_step(params, ema, opt_state, step)
    if step % 100 == 0:
        print(f"step {step}  loss {loss:.4f}", flush=True)

grey = jnp.clip(jnp.rint((sample(ema, jax.random.key(2)) + 1) * 127.5), 0, 255).astype(jnp.uint8)
cells = jnp.pad(grey[..., 0], ((0, 0), (1, 1), (1, 1)), constant_values=128).reshape(4, 4, 10, 10)
rows = cells.swapaxes(1, 2).repeat(6, axis=1).repeat(6, axis=3)  # Four rows of four digits.
Path("minimal.pgm").write_bytes(b"P5 240 240 255\n" + rows.tobytes())
