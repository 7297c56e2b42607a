r"""RePaint: fill a hole in a picture with a network that only ever learned to make whole pictures.

Each step draws the hole as DDPM would and puts the known pixels, noised to that level, around it.
Lugmayr et al. 2022: Inpainting using Denoising Diffusion Probabilistic Models, arXiv 2201.09865.

Notation
  A step down goes from level t to s < t, a step up from lo to hi > lo. alpha_bar is DDPM's;
  alpha_t = alpha_bar_t / alpha_bar_s, beta_t = 1 - alpha_t. obs is the picture; known is 1 where
  its pixels are kept and 0 in the hole. eps, z ~ N(0, I).
Equations ((8a-c) are the paper's, the other numbers DDPM's)
  (4)  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
  (v)  eps_theta = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v_theta   (arXiv 2202.00512)
  (15) x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t)
  (7)  mean = (sqrt(alpha_bar_s) beta_t x0_hat + sqrt(alpha_t) (1 - alpha_bar_s) x_t)
              / (1 - alpha_bar_t),   sigma_t^2 = beta_t (1 - alpha_bar_s) / (1 - alpha_bar_t)
  (8a) xs_known = sqrt(alpha_bar_s) obs + sqrt(1 - alpha_bar_s) z, which is (4) at level s
  (8b) xs_unknown = mean + sigma_t z
  (8c) x_s = known xs_known + (1 - known) xs_unknown
  (2)  x_hi = sqrt(1 - beta) x_lo + sqrt(beta) z,   beta = 1 - alpha_bar_hi / alpha_bar_lo
Differences from the paper
  Its (8a) and Algorithm 1, line 5, write t where s is meant. Line 5 omits a root, and line 10, our
  (2), has the beta of the level below. The authors' code pastes the known pixels before each call
  of the network, never into the result; (8c) ends on alpha_bar_0 = 1: they come back bit for bit.
  (8a) and (8b) share one z, because each pixel uses only one of them.
Run
  python inpaint_afhq.py                                          a box hole in generated faces
  python inpaint_afhq.py --image cat.jpg --known half --fills 6   six fills of your own picture
  python inpaint_afhq.py --repeats 1                              replacement only, to compare
"""
import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn

import common

SCRIPT = "inpaint_afhq"
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


# === walk ===
def walk(levels, jump, repeats):
    """RePaint's way through falling levels: each once, and from some of them up and down again.

    Where 1, 1 + jump, 1 + 2 jump, ... steps are left, it goes `jump` steps up and comes down,
    repeats - 1 times. 250 steps with jump 10 and repeats 10 make 4570 moves, 2410 of them down, as
    in the authors' code. The cost is up to repeats times steps; jump >= steps repeats nothing.
    After a short jump the hole changes little (the paper finds fills blurry at 1). Long jumps leave
    few places to turn, so more bias (seen on Gaussian data). The paper takes 10 of 250.
    """
    steps, way = len(levels) - 1, []
    for k, t in enumerate(levels):
        up, down = levels[k - jump:k][::-1], levels[k - jump + 1:k + 1]
        turns = repeats - 1 if steps - k in range(1, steps - jump + 1, jump) else 0
        way += [t] + turns * (up + down)
    return way
# === end walk ===


@torch.no_grad()
def sample(denoiser, xt, alpha_bar, levels, noise, obs, known, clip=True):
    """Algorithm 1: xt (B, C, H, W) at levels[0] -> x_0, which is obs where known (1, 1, H, W).

    levels is a walk that ends at 0; noise() ~ N(0, I) as xt. A walk that never rises is replacement
    (Song et al. 2021). It is biased: (8b) draws the hole without a look at the pixels that (8a)
    draws beside it, so the two don't fit. A repeat noises both together and draws the hole anew
    from both. Repeats wear off the misfit they start from; the last descent makes a little anew.
    """
    for t, s in zip(levels[:-1], levels[1:]):
        z = noise()
        if s > t:                                                        # up, without the network
            lo, hi = t, s
            beta = 1 - alpha_bar[hi] / alpha_bar[lo]
            xt = (1 - beta).sqrt() * xt + beta.sqrt() * z                            # (2)
            continue
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
        xs_known = diffuse(obs, ab_s, z)                                             # (8a)
        xs_unknown = mean + sigma_t * z                                              # (8b)
        xt = torch.where(known, xs_known, xs_unknown)                                # (8c)
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


def parse_args(argv=None):
    p = common.parser(__doc__, SCRIPT, "ckpt", "device", "dtype", "compile", "gif")
    p.set_defaults(Network=Network)
    add = p.add_argument
    add("--n", type=common.count, default=4, help="number of pictures")
    add("--fills", type=common.count, default=4, help="fills of each picture, with different seeds")
    add("--steps", type=common.count, default=250, help="levels from noise to data, 1 to T; RePaint repeats some")
    add("--jump", type=common.count, default=10, help="RePaint's jump length j: steps to go up")
    add("--repeats", type=common.count, default=10, help="RePaint's resamplings r; 1 is plain replacement")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] in every step")
    add("--image", nargs="+", help="pictures, or folders of them (unset: assets/faces)")
    add("--known", default="box", help="the hole's shape (box, half, thin), or a picture file, white where pixels stay")
    add("--resize", action="store_true", help="bring the hole picture to the network's size")
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv), TRAINED_BY)
    alpha_bar = schedule(args.schedule, args.T)
    known = common.known_pixels(args.known, args.size, args.resize).to(args.device)
    levels = common.even(args.T, args.steps)
    network = common.load(Network(**args.net), args)
    denoiser = Denoiser(network, alpha_bar, args.predict, args.bf16)
    original = common.open_images(args.image, args.n, args).to(args.device)
    obs = original.repeat_interleave(args.fills, 0)
    way, watched, pictures = walk(levels, args.jump, args.repeats), common.watch(denoiser, args), []
    for noise, part in zip(common.noise_batches(len(obs), args, 64), obs.split(64)):
        x0 = sample(watched, noise(), alpha_bar, way, noise, part, known, args.clip)
        pictures.append(x0.cpu())
    x0 = torch.cat(pictures)
    table = common.score_fills(x0, obs, ~known, hole=args.known,
                               picture=[i // args.fills for i in range(len(x0))],
                               fill=[i % args.fills for i in range(len(x0))])
    common.report(table, ["hole"], args.out / "numbers.csv", over=["picture", "fill"])
    common.save_walk(way, args.out / "walk.png", args.seed)
    fills = x0.unflatten(0, (-1, args.fills))                    # (N, fills, C, H, W)
    rows = {"original": original, "hole": torch.where(known, original, 0.5)}
    rows |= {f"fill {k}": fill for k, fill in enumerate(fills.unbind(1)[:8], 1)}
    common.save_samples({"": x0}, args, rows=rows | {"mean of fills": fills.mean(1)})


if __name__ == "__main__":
    common.run(main)
