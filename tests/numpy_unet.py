"""The paper's U-Net written again in NumPy float64, from its description; for the tests alone."""

import numpy as np


def swish(x):
    return x / (1 + np.exp(-x))


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def conv(p, x, stride=1):
    """SAME 3x3: padding 1 all around for stride 1, a row below and a column right for stride 2."""
    kernel, bias = p["kernel"], p["bias"]
    before = 1 if stride == 1 else 0
    x = np.pad(x, ((0, 0), (before, 1), (before, 1), (0, 0)))
    H, W = (x.shape[1] - 3) // stride + 1, (x.shape[2] - 3) // stride + 1
    out = np.zeros((len(x), H, W, kernel.shape[-1])) + bias
    for i in range(3):
        for j in range(3):
            out += x[:, i : i + stride * H : stride, j : j + stride * W : stride] @ kernel[i, j]
    return out


def group_norm(p, x, groups):
    B, H, W, C = x.shape
    g = x.reshape(B, H * W, groups, C // groups)
    g = (g - g.mean(axis=(1, 3), keepdims=True)) / np.sqrt(g.var(axis=(1, 3), keepdims=True) + 1e-6)
    return g.reshape(x.shape) * p["scale"] + p["bias"]


def res_block(p, x, temb, groups):
    h = conv(p["conv_0"], swish(group_norm(p["norm_0"], x, groups)))
    h = h + dense(p["time"], temb)[:, None, None]
    h = conv(p["conv_1"], swish(group_norm(p["norm_1"], h, groups)))
    return h + (dense(p["shortcut"], x) if "shortcut" in p else x)


def attention(p, x, groups):
    B, H, W, C = x.shape
    h = group_norm(p["norm"], x, groups).reshape(B, H * W, C)
    q, k, v = (dense(p[name], h) for name in "qkv")
    weights = np.einsum("bic,bjc->bij", q, k) / np.sqrt(C)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    h = (weights / weights.sum(-1, keepdims=True)) @ v
    return x + dense(p["out"], h).reshape(x.shape)


def unet(p, x, t, model):
    """The output for x [B,H,W,C], t [B] of the network `model` with parameters `p`."""
    groups, levels = model.norm_groups, len(model.channel_multipliers)
    half = model.base_channels // 2
    angles = np.float64(t)[:, None] * np.exp(-np.log(10000) / (half - 1) * np.arange(half))
    temb = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    temb = swish(dense(p["time_1"], swish(dense(p["time_0"], temb))))

    def level_block(h, name):
        h = res_block(p[f"{name}_block"], h, temb, groups)
        return attention(p[f"{name}_attention"], h, groups) if f"{name}_attention" in p else h

    hs = [conv(p["stem"], x)]
    for level in range(levels):
        for i in range(model.num_res_blocks):
            hs.append(level_block(hs[-1], f"down_{level}_{i}"))
        if level < levels - 1:
            hs.append(conv(p[f"down_{level}_downsample"], hs[-1], stride=2))
    h = res_block(p["mid_0_block"], hs[-1], temb, groups)
    h = res_block(p["mid_1_block"], attention(p["mid_attention"], h, groups), temb, groups)
    for level in reversed(range(levels)):
        for i in range(model.num_res_blocks + 1):
            h = level_block(np.concatenate([h, hs.pop()], axis=-1), f"up_{level}_{i}")
        if level:
            h = conv(p[f"up_{level}_upsample"], h.repeat(2, axis=1).repeat(2, axis=2))
    return conv(p["out_conv"], swish(group_norm(p["out_norm"], h, groups)))
