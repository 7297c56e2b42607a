r"""DDIM: sample from DDPM's network with less noise in each step, or none, so in far fewer steps.

Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2020, arXiv 2010.02502.

Notation
  As in ddpm_afhq.py; the paper's alpha_t is DDPM's alpha_bar_t and is called so here. s < t is the
  next level. eta in 0..1 says how much noise a step adds: 0 none, 1 as DDPM with beta_tilde.
Equations
  (4)  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps,   eps ~ N(0, I)
  (5)  L = E || eps - eps_theta(x_t, t) ||^2,   t uniform on 1..T: all weights 1, for every eta
  (9)  x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t)
  (16) sigma_t = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_s)
  (12) x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s - sigma_t^2) eps_theta + sigma_t z
  (v)  eps_theta = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v_theta, if the network outputs
       v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0   (arXiv 2202.00512)
At eta = 0, (12) is Euler's step for the ODE (14), dy = eps_theta dr, y = x / sqrt(alpha_bar),
r = sqrt((1 - alpha_bar) / alpha_bar). Upwards, from data to noise, it encodes a picture.
Differences from the paper
  Levels are even from T down to 0; the authors' 50 steps start at 980 of 0..999.
  After x0_hat is clipped, eps_theta is computed anew, so that (12) mixes a consistent pair.
  Training is that of ddpm_afhq.py, whose checkpoints this script reads and writes.
Run
  python ddim_afhq.py                      sample from the shipped weights in 50 steps
  python ddim_afhq.py --steps 10 --eta 1   what noise costs when steps are few
  python ddim_afhq.py --interpolate        rows of pictures from one noise to another
  python ddim_afhq.py --image cat.jpg      a picture, its noise, and the picture made from the noise
"""
import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

import common

SCRIPT = "ddim_afhq"
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

    It needs only q(x_t | x_0), which is the same for every eta: DDPM's network needs no retraining.
    """
    t = torch.randint(1, len(alpha_bar), (len(x0),))                                 # (B,)
    eps = torch.randn(x0.shape).to(x0.device)
    ab_t = alpha_bar[t][:, None, None, None]                                         # (B, 1, 1, 1)
    eps_hat = denoiser(diffuse(x0, ab_t, eps), t)
    snr = ab_t / (1 - ab_t)
    w = (5 / snr).clamp(max=1).to(x0) if weight == "min-snr" else 1    # 2303.09556, gamma = 5
    distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}[error]
    return (w * distance(eps_hat, eps, reduction="none")).mean()                     # (5)


@torch.no_grad()
def sample(denoiser, xt, alpha_bar, levels, noise=None, eta=0.0, clip=True):
    """Walk xt (B, C, H, W) from levels[0] to levels[-1]; noise() ~ N(0, I) like xt, for eta > 0.

    Levels may be skipped: the process behind (12) can be defined on a subset of them (sect. 4.2).
    Rising levels encode, with eta = 0 and clip = False, since what is clipped can't be found again.
    """
    for t, s in zip(levels[:-1], levels[1:]):
        ab_t, ab_s = alpha_bar[t], alpha_bar[s]
        eps_hat = denoiser(xt, torch.full((len(xt),), max(t, 1)))                  # 0 only upwards
        x0_hat = (xt - (1 - ab_t).sqrt() * eps_hat) / ab_t.sqrt()                    # (9)
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
            eps_hat = (xt - ab_t.sqrt() * x0_hat) / (1 - ab_t).sqrt()
        beta_tilde = (1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)     # below 0 where levels rise
        sigma_t = eta * beta_tilde.clamp(min=0).sqrt()                               # (16)
        xt = ab_s.sqrt() * x0_hat + (1 - ab_s - sigma_t ** 2).sqrt() * eps_hat
        xt = xt + sigma_t * noise() if eta else xt                                   # (12)
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
    add("--steps", type=common.count, default=50, help="sampling steps, each one network evaluation, 1 to T")
    add("--eta", type=common.share, default=0.0, help="noise in a step: 0 none, 1 as much as DDPM's")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] in every step")
    add("--image", nargs="?", const=common.FACES, help="picture to encode as noise and decode (alone: a shipped face)")
    add("--interpolate", action="store_true", help="each row goes from one noise to another; n is the number of rows")
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
    if args.eta and (args.image or args.interpolate):
        common.stop("--image and --interpolate need --eta 0, where the first noise decides alone.")
    original = common.open_images([args.image], 1, args).to(args.device) if args.image else None
    levels = common.even(args.T, args.steps)
    network = train(args, alpha_bar) if args.train else common.load(Network(**args.net), args)
    denoiser = common.watch(Denoiser(network, alpha_bar, args.predict, args.bf16), args)
    pictures = []
    for noise in common.noise_batches(args.n, args):
        xt = noise()
        if args.image:
            xt = sample(denoiser, original[:1], alpha_bar, levels[::-1], clip=False)
            original = torch.cat([original[:1], xt / 3])     # noise / 3 fits in [-1, 1]
        if args.interpolate:
            xt = common.slerp(xt, noise(), 8)            # a row of eight for each picture
        x0 = sample(denoiser, xt, alpha_bar, levels, noise, args.eta, args.clip and not args.image)
        pictures.append(x0.cpu())
    common.save_samples({"": torch.cat(pictures)}, args, original)


if __name__ == "__main__":
    common.run(main)
