r"""DDPM: train a network to predict the noise in a noisy picture; make pictures by removing noise.

Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020, arXiv 2006.11239.

Notation
  t = 1..T is the noise level, t = 0 is data. beta_t is given, alpha_t = 1 - beta_t, and alpha_bar_t
  = alpha_1 ... alpha_t, so alpha_bar_0 = 1. Sampling goes from t to s < t, the paper's t - 1.
  Courses that count t = 0..T-1 mean our t - 1: call their networks as network(xt, t - 1).
Equations
  (4)  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)
  (14) L = E || eps - eps_theta(x_t, t) ||^2,   t uniform on 1..T
  (15) x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t)
  (7)  mean = (sqrt(alpha_bar_s) beta_t x0_hat + sqrt(alpha_t) (1 - alpha_bar_s) x_t)
              / (1 - alpha_bar_t)
       beta_tilde = beta_t (1 - alpha_bar_s) / (1 - alpha_bar_t)
  (6)  x_s ~ q(x_s | x_t, x_0 = x0_hat) = N(mean, beta_tilde I)
  (v)  eps_theta = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v_theta   (arXiv 2202.00512)
Differences from the paper
  Algorithm 2 writes (15) and (7) as one, (11). Two lines let us clip x0_hat in between, where
  errors of eps_theta are divided by a small sqrt(alpha_bar_t).
  The network outputs v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, the schedule is cosine,
  (14) is weighted: these three decide between faces and noise. The U-Net is smaller, and learns by
  Muon, not Adam. The paper has --schedule linear --predict eps --weight uniform --patch 1.
  Sampling may skip levels: alpha_t is then alpha_bar_t / alpha_bar_s.
Run
  python ddpm_afhq.py                                     sample from the shipped weights
  python ddpm_afhq.py --image cat.jpg --strength 0.6      vary a picture (SDEdit, arXiv 2108.01073)
  python ddpm_afhq.py --train --data drawn --iters 3000   train without a download, then sample
"""
import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import common

SCRIPT = "ddpm_afhq"
TRAINED_BY = "ddpm_afhq", "ddim_afhq"        # the scripts whose checkpoints this one can read


# === schedule ===
def cosine(T):
    """beta of Nichol and Dhariwal 2021, 2102.09672: alpha_bar a squared cosine, clamped above 0."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES = {                                # T -> beta_1 ... beta_T; all but cosine suit T = 1000
    "linear": lambda T: torch.linspace(1e-4, 0.02, T, dtype=torch.float64),
    "quadratic": lambda T: torch.linspace(1e-4 ** 0.5, 0.02 ** 0.5, T, dtype=torch.float64) ** 2,
    "sigmoid": lambda T: 1e-4 + 0.0199 * torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid(),
    "cosine": cosine}


def schedule(name="cosine", T=1000):
    """alpha_bar_0 = 1, alpha_bar_1, ..., alpha_bar_T float64 (T + 1,), for a name in SCHEDULES."""
    beta = SCHEDULES[name](T)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])


def diffuse(x0, ab_t, eps):
    """x_t from q(x_t | x_0). ab_t is a scalar or (B, 1, 1, 1); its roots are taken in float64."""
    return ab_t.sqrt().to(x0) * x0 + (1 - ab_t).sqrt().to(x0) * eps                  # (4)


class Denoiser:
    """denoiser(xt, t) is eps_theta(x_t, t), whether the network outputs eps or v.

    xt (B, C, H, W) on any device, t (B,) on the CPU. loss and sample see a network only so.
    """

    def __init__(self, network, alpha_bar, predict="eps", bf16=False):
        self.network, self.alpha_bar, self.predict, self.bf16 = network, alpha_bar, predict, bf16

    def __call__(self, xt, t):
        with common.autocast(xt.device, self.bf16):
            output = self.network(xt, t.to(xt.device)).to(xt.dtype)
        if self.predict == "eps":
            return output
        ab_t = self.alpha_bar[t][:, None, None, None]                                # (B, 1, 1, 1)
        return (1 - ab_t).sqrt().to(xt) * xt + ab_t.sqrt().to(xt) * output           # (v)
# === end schedule ===


def loss(denoiser, x0, alpha_bar, weight="uniform", error="l2"):
    """DDPM's Algorithm 1, lines 3 to 5: x0 (B, C, H, W) in [-1, 1] -> a scalar to minimise.

    The bound on -log p(x_0) is a weighted sum over t of these errors (the paper's (12)); (14) sets
    all weights to 1 for better pictures; min-snr (2303.09556, gamma = 5) lowers those of snr > 5.
    """
    t = torch.randint(1, len(alpha_bar), (len(x0),))                                 # (B,)
    eps = torch.randn(x0.shape).to(x0.device)
    ab_t = alpha_bar[t][:, None, None, None]                                         # (B, 1, 1, 1)
    eps_hat = denoiser(diffuse(x0, ab_t, eps), t)
    snr = ab_t / (1 - ab_t)
    w = (5 / snr).clamp(max=1).to(x0) if weight == "min-snr" else 1    # 2303.09556, gamma = 5
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[error]
    return (w * distance(eps_hat, eps, reduction="none")).mean()                     # (14)


@torch.no_grad()
def sample(denoiser, xt, alpha_bar, levels, noise, variance="small", clip=True):
    """Algorithm 2: xt (B, C, H, W) at levels[0] -> x_0. levels ends at 0; noise() draws N(0, I).

    beta_tilde ("small") is the exact variance for data at one point, beta_t ("large") for N(0, I).
    """
    for t, s in zip(levels[:-1], levels[1:]):
        ab_t, ab_s = alpha_bar[t], alpha_bar[s]
        alpha_t = ab_t / ab_s
        beta_t = 1 - alpha_t
        eps_hat = denoiser(xt, torch.full((len(xt),), t))
        x0_hat = (xt - (1 - ab_t).sqrt() * eps_hat) / ab_t.sqrt()                    # (15)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        mean = ab_s.sqrt() * beta_t * x0_hat + alpha_t.sqrt() * (1 - ab_s) * xt
        mean = mean / (1 - ab_t)                                                     # (7)
        sigma_t = (beta_t * (1 - ab_s) / (1 - ab_t)).sqrt()                        # (7): 0 at s = 0
        if variance == "large":
            sigma_t = beta_t.sqrt() * (s > 0)
        xt = mean + sigma_t * noise()                                                # (6)
    return xt


# === unet ===
def norm(c):
    """GroupNorm of c channels in groups of four or more, at most 32 groups."""
    return common.GroupNorm(next(g for g in range(min(32, c // 4), 0, -1) if c % g == 0), c)


def zero(layer):
    """The layer with weights 0: a branch that ends in it adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def encode(t, width):
    """t (B,), whole or not -> cosines and sines (B, width) at frequencies from 1 down to 1e-4."""
    freq = torch.exp(-math.log(1e4) * torch.linspace(0, 1, width // 2, device=t.device))
    arg = t.float()[:, None] * freq
    return torch.cat([arg.cos(), arg.sin()], 1)


class Block(nn.Module):
    """Residual block; the level scales and shifts its second norm. Then perhaps self-attention."""

    def __init__(self, c_in, c_out, c_time, attention, dropout):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.norm2, self.dropout = norm(c_out), nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = attention
        if attention:
            self.norm3, self.qkv = norm(c_out), nn.Conv2d(c_out, 3 * c_out, 1)
            self.proj = zero(nn.Conv2d(c_out, c_out, 1))

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        x = self.skip(x) + h
        if self.attention:
            B, C, H, W = x.shape
            width = math.gcd(C, 64)                               # of a head: 64 if it can be
            qkv = self.qkv(self.norm3(x)).reshape(B, 3, C // width, width, H * W)
            q, k, v = qkv.mT.unbind(1)                            # (B, heads, H W, width)
            share = (q / width ** 0.5 @ k.mT).softmax(3)          # (B, heads, pixel, pixel read)
            x = x + self.proj((share @ v).mT.reshape(x.shape))
        return x


class UNet(nn.Module):
    """A U-Net like DDPM's for (B, channels, size, size). Keywords with a default become flags.

    patch: side of the pixel squares that are folded into channels first: work is at size / patch
    ch: channels at the first resolution (KAIST's course: 128)
    mult: channel factor of each resolution (course: 1 2 2 2)
    blocks: residual blocks at each resolution (course: 4)
    attn: sides with self-attention, besides the middle's (course: 32)
    dropout: share of values dropped in the residual blocks (course: 0.1)
    """

    def __init__(self, size, channels, patch=2, ch=32, mult=(1, 2, 4), blocks=2, attn=(16, 8),
                 dropout=0.0):
        super().__init__()
        sides = [size // patch // 2 ** i for i in range(len(mult))]
        whole = mult and size == sides[-1] * patch * 2 ** (len(mult) - 1)
        if not whole or not set(attn) <= set(sides) or ch < 4:
            common.stop(f"--size {size} is no multiple of --patch times 2 for each --mult but the "
                        f"first, --attn is not among the sides {sides}, or --ch is below 4.")
        self.patch, c_time, c = patch, 4 * ch, ch
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.conv_in = nn.Conv2d(channels * patch ** 2, ch, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [ch]
        for i, (side, m) in enumerate(zip(sides, mult)):
            for _ in range(blocks):
                self.down.append(Block(c, ch * m, c_time, side in attn, dropout))
                c = ch * m
                skips.append(c)
            if i < len(mult) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.mid = nn.ModuleList([Block(c, c, c_time, on, dropout) for on in (True, False)])
        for i, (side, m) in reversed(list(enumerate(zip(sides, mult)))):
            for _ in range(blocks + 1):
                self.up.append(Block(c + skips.pop(), ch * m, c_time, side in attn, dropout))
                c = ch * m
            if i > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm = norm(c)
        self.conv_out = zero(nn.Conv2d(c, channels * patch ** 2, 3, padding=1))

    def forward(self, xt, t):
        """xt (B, C, H, W), t (B,) in 0..T -> (B, C, H, W)."""
        emb = self.time(encode(t, self.time[0].in_features))
        emb = F.silu(emb)
        h = self.conv_in(F.pixel_unshuffle(xt, self.patch))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], 1), emb)
            else:
                h = layer(F.interpolate(h, scale_factor=2.0))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm(h))), self.patch)


Network = UNet   # put another network here: any class with keywords size and channels and this call
# === end unet ===


# === train ===
def train(args, alpha_bar):
    """Algorithm 1 with Muon (see common.py), warm-up, decay, and an average of the weights."""
    images, labels, names = common.load_images(args.data, "train", args.size, args.skip_bad)
    args.net = args.net or common.network_keywords(Network, args, images)
    torch.manual_seed(args.seed)
    network = Network(**args.net).to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = common.Muon(network.parameters(), args.bf16)
    run = common.Run(args, names, network, ema, optimizer)
    denoiser = Denoiser(common.parallel(network, args), alpha_bar, args.predict, args.bf16)
    averaged = Denoiser(ema, alpha_bar, args.predict, args.bf16)
    batches = common.batches(images.to(args.device), labels, args.batch // args.world)
    common.save_forward(images, lambda x0, t, eps: diffuse(x0, alpha_bar[t], eps), args)

    def preview(noise):
        return sample(averaged, noise(), alpha_bar, common.even(args.T, 50), noise)

    for it in run:                                       # from 1, or where --resume goes on
        for group in optimizer.param_groups:           # up in 100 steps, down to 0 in the last 40 %
            group["lr"] = args.lr * min(1, it / 100, (args.iters + 1 - it) / (0.4 * args.iters))
        x0, y = next(batches)
        L = loss(denoiser, x0, alpha_bar, args.weight, args.loss)
        optimizer.zero_grad()
        L.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + it) / (10 + it))    # a short memory while the weights move fast
        for p_ema, p in zip(ema.parameters(), network.parameters()):
            p_ema.lerp_(p.detach(), 1 - decay)
        run.step(it, L, preview)
    return ema
# === end train ===


def parse_args(argv=None):
    p = common.parser(__doc__, SCRIPT, "data", "size", "skip-bad", "ckpt", "device", "dtype",
                      "compile", "train", "resume", "save", "gif")
    add = p.add_argument
    add("--n", type=common.count, default=16, help="number of pictures")
    add("--steps", type=common.count, default=250, help="sampling steps, each one network evaluation, 1 to T")
    add("--variance", default="small", choices=["small", "large"], help="variance of a step: beta_tilde or beta_t")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] in every step")
    add("--image", help="start from this picture instead of from noise")
    add("--strength", type=common.fraction, default=0.6, help="with --image: noise it to level strength * T")
    # === training flags ===
    add("--iters", type=common.count, default=12000, help="optimiser steps")
    add("--batch", type=common.count, default=32, help="pictures per optimiser step")
    add("--lr", type=common.positive, default=2.4e-3, help="peak learning rate of Muon")
    add("--ema", type=common.decay, default=0.9995, help="largest decay of the average of the weights")
    add("--loss", default="l2", choices=["l2", "l1", "huber"], help="distance of eps_theta from eps")
    add("--schedule", default="cosine", choices=SCHEDULES, help="noise schedule")
    add("--T", type=common.count, default=1000, help="number of noise levels; 1000 for all schedules but cosine")
    add("--predict", default="v", choices=["eps", "v"], help="what the network outputs")
    add("--weight", default="min-snr", choices=["uniform", "min-snr"], help="weight of the loss over t")
    common.add_network_flags(p, Network)
    # === end training flags ===
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv), TRAINED_BY)
    alpha_bar = schedule(args.schedule, args.T)
    original = common.open_images([args.image], 1, args).to(args.device) if args.image else None
    start = max(1, round(args.strength * args.T)) if args.image else args.T
    args.steps = min(args.steps, start)
    if args.image:
        common.save_forward(original, lambda x0, t, eps: diffuse(x0, alpha_bar[t], eps), args)
    levels = common.even(start, args.steps)
    network = train(args, alpha_bar) if args.train else common.load(Network(**args.net), args)
    denoiser = common.watch(Denoiser(network, alpha_bar, args.predict, args.bf16), args)
    pictures = []
    for noise in common.noise_batches(args.n, args):
        xt = noise()
        if args.image:
            xt = diffuse(original, alpha_bar[start], xt)
        x0 = sample(denoiser, xt, alpha_bar, levels, noise, args.variance, args.clip)
        pictures.append(x0.cpu())
    common.save_samples({"": torch.cat(pictures)}, args, original)


if __name__ == "__main__":
    common.run(main)
