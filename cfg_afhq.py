r"""Classifier-free guidance: learn eps with and without labels; sample by exaggerating the difference.

Ho, Salimans: Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598. Steps also from DPM-Solver
(2206.00927) and DPM-Solver++ (2211.01095), levels from EDM (2206.00364), lo and hi from 2404.07724.

Notation
  As in ddpm_afhq.py; numbers without a name are DDPM's. To s < t: beta_t = 1 - (a_t / a_s)^2.
  y in 1..K is a label, 0 the empty one; eps_c, eps_u: eps_theta(x_t, t, y), (x_t, t, 0). Their w
  is scale - 1. a_t^2 = alpha_bar_t = 1 - std_t^2, lambda_t = log(a_t / std_t), h = lambda_s - lambda_t.
Equations
  (4)  x_t = a_t x_0 + std_t eps,   eps ~ N(0, I)
  (14) L = E weight || eps - eps_theta(x_t, t, y) ||^2,   y replaced by 0 with probability 0.1
  (v)  eps_theta = std_t x_t + a_t v_theta if the network outputs v = a_t eps - std_t x_0   (2202.00512)
  (CFG 6) eps_hat = eps_u + scale (eps_c - eps_u) where lo < std_t / a_t <= hi, and eps_c elsewhere
  (15) x0_hat = (x_t - std_t eps_hat) / a_t
  (7)  x_s = (a_s beta_t x0_hat + sqrt(alpha_t) std_s^2 x_t) / std_t^2 + sigma_t z, sigma_t with eta = 1
  (DDIM 16) sigma_t = eta (std_s / std_t) sqrt(1 - (a_t / a_s)^2)
  (DDIM 12) x_s = a_s x0_hat + sqrt(std_s^2 - sigma_t^2) eps_hat + sigma_t z
  (DPM 3.7) x_s = (a_s / a_t) x_t - std_s (e^h - 1) eps_hat,   std_s e^h = a_s std_t / a_t
  (2M) x_s = (std_s / std_t) x_t + (a_s - a_t std_s / std_t) D,   D = x0_hat + (h / 2) d x0_hat / d lambda
  (EDM 5) (std_t / a_t)^(1/7) is evenly spaced from 80^(1/7), or level T's if that is lower, to level 1's
Differences from the paper
  It trains on a continuous log-SNR, with the law that a cosine schedule gives to a uniform t; we draw t.
  It samples like DDPM, with a larger variance than our ddpm_step, and guides at all levels
  (--interval 0 inf); we leave out both ends, where a high scale ruins the colours.
Run
  python cfg_afhq.py --scale 0 1 2 4 8 --label cat        a row for each scale: at 0 any class, then cats
  python cfg_afhq.py --solver ddim --steps 50 --eta 0.5   DDIM with some noise in each step
"""
import argparse
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common

SCRIPT = "cfg_afhq"
TRAINED_BY = "cfg_afhq",                     # the scripts whose checkpoints this one can read


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

    def __call__(self, xt, t, y):  # cfg
        """eps_theta(x_t, t, y), y (B,) in 0..K; t may lie between two whole levels."""  # cfg
        with common.autocast(xt.device, self.bf16):
            output = self.network(xt, t.to(xt.device), y.to(xt.device)).to(xt.dtype)  # cfg
        if self.predict == "eps":
            return output
        ab_t = alpha_bar_at(self.alpha_bar, t)[:, None, None, None]           # (B, 1, 1, 1)  # cfg
        return (1 - ab_t).sqrt().to(xt) * xt + ab_t.sqrt().to(xt) * output           # (v)
# === end schedule ===


def alpha_bar_at(alpha_bar, t):
    """alpha_bar at t, numbers or (B,), float64: between whole levels its logarithm is linear."""
    return torch.as_tensor(np.interp(t, range(len(alpha_bar)), alpha_bar.log())).exp()


def loss(denoiser, x0, y, alpha_bar, weight="uniform", error="l2", drop=0.1):
    """Algorithm 1: x0 (B, C, H, W) in [-1, 1], y (B,) in 1..K -> a scalar to minimise.

    Pictures that lose their label teach eps_u. The paper finds drop = 0.1 as good as 0.2, and 0.5
    worse: eps_u takes only a small part of the network.
    """
    t = torch.randint(1, len(alpha_bar), (len(x0),))                                 # (B,)
    eps = torch.randn(x0.shape).to(x0.device)
    y = y * (torch.rand(len(y)) >= drop).to(y)                   # 0, the empty label, where dropped
    ab_t = alpha_bar[t][:, None, None, None]                                         # (B, 1, 1, 1)
    eps_hat = denoiser(diffuse(x0, ab_t, eps), t, y)
    snr = ab_t / (1 - ab_t)
    w = (5 / snr).clamp(max=1).to(x0) if weight == "min-snr" else 1    # 2303.09556, gamma = 5
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[error]
    return (w * distance(eps_hat, eps, reduction="none")).mean()                     # (14)


def guided(denoiser, xt, t, y, scale):
    """eps_hat at level t, a number, for labels y (B,). At scale 0 and 1 one evaluation is enough.

    eps is -std_t times the score, so by Bayes' rule eps_c - eps_u is -std_t grad log p(y | x_t), a
    classifier's: eps_hat has the score of p(x_t) p(y | x_t)^scale, as if y were seen scale times.
    That holds level by level: x_0 of p(x_0) p(y | x_0)^scale, made noisy, has another score.
    """
    t = torch.full((len(xt),), t)
    if scale in (0, 1):
        return denoiser(xt, t, y * int(scale))
    eps_c, eps_u = denoiser(torch.cat([xt, xt]), t.repeat(2), torch.cat([y, 0 * y])).chunk(2)
    return eps_u + scale * (eps_c - eps_u)                                           # (CFG 6)


def ddpm_step(xt, x0_hat, noise, a_t, std_t, a_s, std_s):
    """x_s ~ q(x_s | x_t, x_0 = x0_hat)."""
    beta_t = 1 - (a_t / a_s) ** 2                              # a_t / a_s is sqrt(alpha_t)
    mean = (a_s * beta_t * x0_hat + a_t / a_s * std_s ** 2 * xt) / std_t ** 2
    sigma_t = beta_t.sqrt() * std_s / std_t                    # the root of beta_tilde
    return mean + sigma_t * noise()                                                  # (7)


def ddim_step(x0_hat, eps_hat, noise, eta, a_t, std_t, a_s, std_s):
    """eta = 0 adds no noise, eta = 1 as much as ddpm_step."""
    sigma_t = eta * std_s / std_t * (1 - (a_t / a_s) ** 2).sqrt()                    # (DDIM 16)
    xs = a_s * x0_hat + (std_s ** 2 - sigma_t ** 2).sqrt() * eps_hat
    return xs + sigma_t * noise() if eta else xs                                     # (DDIM 12)


def dpm1_step(xt, eps_hat, a_t, std_t, a_s, std_s):
    """The exact solution of the ODE if eps_hat were constant on the way: ddim_step at eta = 0.

    std_s e^h is written a_s std_t / a_t, since h is infinite on the way to level 0.
    """
    return a_s / a_t * xt - (a_s * std_t / a_t - std_s) * eps_hat                    # (DPM 3.7)


def dpm2_step(xt, eps_hat, start, a_t, std_t, a_s, std_s):
    """DPM-Solver-2 in two calls: to the midpoint in lambda, then all the way with its eps_hat.

    start is None in the first call and x_t, a_t, std_t of the first in the second. Returns x_s and
    the next start. The way to level 0 has no midpoint, so there one call goes all the way.
    """
    if start and std_s > 0:
        xt, a_t, std_t = start
    xs = dpm1_step(xt, eps_hat, a_t, std_t, a_s, std_s)
    return xs, None if start else (xt, a_t, std_t)


def dpmpp_2m_step(xt, x0_hat, before, a_t, std_t, a_s, std_s):
    """DPM-Solver++(2M): x0_hat goes on changing with lambda as it did since the step before.

    before is that step's x0_hat and lambda, None in the first step. Returns x_s and the before of
    the next step. In the first step, and in the last, where h is infinite, D is x0_hat.
    """
    D, lam_t = x0_hat, (a_t / std_t).log()
    if before and std_s > 0:
        c = ((a_s / std_s).log() - lam_t) / (lam_t - before[1]) / 2    # the paper's 1 / (2 r)
        D = (1 + c) * x0_hat - c * before[0]
    return std_s / std_t * xt + (a_s - a_t * std_s / std_t) * D, (x0_hat, lam_t)     # (2M)


@torch.no_grad()
def sample(denoiser, xt, y, alpha_bar, levels, noise, scale, solver="ddim", eta=0.0, clip=True,
           lo=0.0, hi=math.inf):
    """Algorithm 2: xt (B, C, H, W) at levels[0], y (B,) -> x_0. levels, whole or not, end at 0.

    It guides where lo < std_t / a_t <= hi (Kynkaanniemi et al. 2024), Ho and Salimans everywhere.
    A high scale drives x0_hat out of [-1, 1], where no picture is, and later steps amplify it.
    dpm1 and dpm2, as their paper has them, do not clip, and burn out; the others clip x0_hat.
    """
    ab, memory = alpha_bar_at(alpha_bar, levels), None         # memory: dpm2's and dpm++2m's
    a, std = ab.sqrt(), (1 - ab).sqrt()                                              # (steps + 1,)
    for t, *factors in zip(levels, a, std, a[1:], std[1:]):
        a_t, std_t, *_ = factors                               # and a_s, std_s
        eps_hat = guided(denoiser, xt, t, y, scale if lo < std_t / a_t <= hi else 1)
        x0_hat = (xt - std_t * eps_hat) / a_t                                        # (15)
        if clip and solver not in ("dpm1", "dpm2"):
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - a_t * x0_hat) / std_t
        if solver == "ddpm":
            xt = ddpm_step(xt, x0_hat, noise, *factors)
        elif solver == "ddim":
            xt = ddim_step(x0_hat, eps_hat, noise, eta, *factors)
        elif solver == "dpm1":
            xt = dpm1_step(xt, eps_hat, *factors)
        elif solver == "dpm2":
            xt, memory = dpm2_step(xt, eps_hat, memory, *factors)
        else:
            xt, memory = dpmpp_2m_step(xt, x0_hat, memory, *factors)
    return xt


def levels_for(solver, alpha_bar, steps, spacing=None):
    """steps levels at which eps_hat is evaluated, falling to 1 (uniform: to T / steps); then 0.

    uniform: even in t; ddpm, ddim and dpm1 take it unless told otherwise.
    karras:  even in (std_t / a_t)^(1/7), so dense where little noise is left; for dpm++2m.
    lambda:  even in lambda, for dpm2: every second level is the midpoint of a step. When steps is
             even, the last step above level 1 goes without a midpoint.
    The cosine schedule's lambda falls to -10, but below -5.1, where the linear one ends, a_t is
    less than 0.0061 and x_t is noise: levels spent there are missing where pictures take shape.
    """
    spacing = spacing or {"dpm2": "lambda", "dpm++2m": "karras"}.get(solver, "uniform")
    if spacing == "uniform":
        return common.even(len(alpha_bar) - 1, steps)
    ends = (0.5 * torch.logit(alpha_bar[[-1, 1]])).clamp(min=-5.1)     # lambda at T and at level 1
    u = torch.linspace(0, 1, steps | 1 if spacing == "lambda" else steps, dtype=torch.float64)
    lam = torch.lerp(*ends, u)                                  # -log alpha_bar is softplus(-2 lam)
    if spacing == "karras":
        root = torch.exp(-ends / 7).clamp(max=80 ** (1 / 7))           # (std_t / a_t)^(1/7)
        lam = -7 * torch.lerp(*root, u).log()                                        # (EDM 5)
    levels = np.interp(F.softplus(-2 * lam), -alpha_bar.log(), range(len(alpha_bar))).tolist()
    return levels[:steps - 1] + [levels[-1], 0]


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

    def __init__(self, size, channels, classes, patch=2, ch=32, mult=(1, 2, 4), blocks=2,  # cfg
                 attn=(16, 8), dropout=0.0):  # cfg
        super().__init__()
        sides = [size // patch // 2 ** i for i in range(len(mult))]
        whole = mult and size == sides[-1] * patch * 2 ** (len(mult) - 1)
        if not whole or not set(attn) <= set(sides) or ch < 4:
            common.stop(f"--size {size} is no multiple of --patch times 2 for each --mult but the "
                        f"first, --attn is not among the sides {sides}, or --ch is below 4.")
        self.patch, c_time, c = patch, 4 * ch, ch
        self.time = nn.Sequential(nn.Linear(c_time, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.label = nn.Embedding(classes + 1, c_time)  # cfg
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

    def forward(self, xt, t, y):  # cfg
        """xt (B, C, H, W), t (B,) in 0..T, y (B,) in 0..classes -> (B, C, H, W)."""  # cfg
        emb = self.time(encode(t, self.time[0].in_features))
        emb = emb + self.label(y)  # cfg
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


Network = UNet   # put another network here: keywords size, channels, classes and this call  # cfg
# === end unet ===


# === train ===
def train(args, alpha_bar):
    """Algorithm 1 with Muon (see common.py), warm-up, decay, and an average of the weights."""
    images, labels, names = common.load_images(args.data, "train", args.size, args.skip_bad)
    args.net = args.net or common.network_keywords(Network, args, images, names)  # cfg
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
        y = torch.arange(8) % len(names) + 1                       # the classes in turn  # cfg
        levels = levels_for("dpm++2m", alpha_bar, 20)  # cfg
        return sample(averaged, noise(), y, alpha_bar, levels, noise, 2.0, "dpm++2m")  # cfg

    for it in run:                                       # from 1, or where --resume goes on
        for group in optimizer.param_groups:           # up in 100 steps, down to 0 in the last 40 %
            group["lr"] = args.lr * min(1, it / 100, (args.iters + 1 - it) / (0.4 * args.iters))
        x0, y = next(batches)
        L = loss(denoiser, x0, y, alpha_bar, args.weight, args.loss, args.drop)  # cfg
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
                      "compile", "train", "resume", "save")
    add = p.add_argument
    add("--n", type=common.count, default=8, help="number of pictures of each class at each scale")
    add("--steps", type=common.count, default=20, help="levels at which eps_hat is evaluated, 1 to T")
    add("--scale", type=common.finite, default=[4.0], nargs="+", help="0 unconditional, 1 conditional; w is scale - 1")
    add("--interval", type=common.bound, default=[0.5, 2.0], nargs=2, metavar=("LO", "HI"),
        help="guide only where LO < std_t / a_t <= HI, and HI may be inf")
    add("--label", help="class to sample, by its name or number")
    add("--solver", default="dpm++2m", choices=["ddpm", "ddim", "dpm1", "dpm2", "dpm++2m"], help="kind of step")
    add("--spacing", choices=["uniform", "karras", "lambda"], help="spacing of the levels (unset: the solver's own)")
    add("--eta", type=common.share, default=0.0, help="noise in a step: 0 none, 1 as much as DDPM's")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] in every step")
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
    add("--drop", type=common.share, default=0.1, help="share of labels replaced by the empty label in training")  # cfg
    # === end training flags ===
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv), TRAINED_BY)
    alpha_bar = schedule(args.schedule, args.T)
    # dpm1 and dpm2 do not clip, and dpm2 has midpoints of its own
    common.refuse(args, "solver", {"ddpm": "eta", "dpm1": "eta clip", "dpm2": "eta clip spacing",
                                   "dpm++2m": "eta"})
    levels = levels_for(args.solver, alpha_bar, args.steps, args.spacing)
    network = train(args, alpha_bar) if args.train else common.load(Network(**args.net), args)
    denoiser = common.watch(Denoiser(network, alpha_bar, args.predict, args.bf16), args)
    groups = {}
    for folder, label, scale in common.rows_of(args):
        pictures = []
        for noise in common.noise_batches(args.n, args):
            xt = noise()
            x0 = sample(denoiser, xt, torch.full((len(xt),), label), alpha_bar, levels, noise,
                        scale, args.solver, args.eta, args.clip, *args.interval)
            pictures.append(x0.cpu())
        groups[folder] = torch.cat(pictures)
    common.save_samples(groups, args)


if __name__ == "__main__":
    common.run(main)
