r"""MCG: pull each step towards what was measured, by a gradient through the network; and rivals.

Measured are all pixels but a hole, or averages of k x k pixels, or of each pixel's three colours.
Chung, Sim, Ryu, Ye: Improving Diffusion Models for Inverse Problems using Manifold Constraints,
2022, arXiv 2206.00941. DPS: Chung et al. 2023, 2209.14687. PiGDM: Song et al. 2023, ICLR. MMPS:
Rozet et al. 2024, 2405.13712. For replacement and RePaint see inpaint_afhq.py.

Notation
  From t to s < t: alpha_t = alpha_bar_t / alpha_bar_s, beta_t = 1 - alpha_t. P is a projection: it
  keeps known pixels or takes means. obs = P original, resid = obs - P x0_hat, J = d x0_hat / d x_t.
Equations (the numbers are DDPM's)
  (4)  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
  (v)  eps_theta = sqrt(1 - alpha_bar_t) x_t + sqrt(alpha_bar_t) v_theta   (arXiv 2202.00512)
  (15) x0_hat = (x_t - sqrt(1 - alpha_bar_t) eps_theta) / sqrt(alpha_bar_t)
  (7)  mean = (sqrt(alpha_bar_s) beta_t x0_hat + sqrt(alpha_t) (1 - alpha_bar_s) x_t)
              / (1 - alpha_bar_t),   sigma_t^2 = beta_t (1 - alpha_bar_s) / (1 - alpha_bar_t)
  (6)  x_s = mean + sigma_t z
  (2)  x_hi = sqrt(1 - beta) x_lo + sqrt(beta) z,   beta = 1 - alpha_bar_hi / alpha_bar_lo
  (MCG)     x_s <- x_s - zeta d|resid| / dx_t
  (replace) x_s <- x_s - P x_s + P (sqrt(alpha_bar_s) obs + sqrt(1 - alpha_bar_s) z)
  (PiGDM)   x0_hat <- x0_hat + J^T resid / sqrt(alpha_bar_t)
  (MMPS)    x0_hat <- x0_hat + J P (P J P)^+ resid, with the pseudo-inverse
Differences from the papers
  MCG's code replaces at level t, and so not in the result. Here it is done at s, and known pixels
  come back bit for bit. Its norm is taken over the batch, here over each picture by itself.
Run
  python mcg_inpaint.py                                       all methods, a box hole
  python mcg_inpaint.py --task sr4 --image cat.jpg --method mcg mmps
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import common

SCRIPT = "mcg_inpaint"
TRAINED_BY = "ddpm_afhq", "ddim_afhq"        # the scripts whose checkpoints this one can read
METHODS = "replace", "repaint", "mcg", "dps", "pigdm", "mmps"


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
def sample(denoiser, xt, alpha_bar, levels, noise, obs, project, method="mcg", zeta=3.0, cg=3,
           clip=True):
    """xt (B, C, H, W) at levels[0] -> x_0 that agrees, more or less, with obs = project(original).

    levels ends at 0; for repaint it is a walk. noise() ~ N(0, I) as xt. replace and repaint use
    (replace) alone. mcg uses (MCG) and then (replace), which keeps of (MCG) only what lies outside
    P. dps uses (MCG) alone: it gives up exact agreement, but stays nearer the manifold (see
    norm_gradient) and pastes no noise of a noisy measurement. pigdm and mmps move x0_hat instead.
    All gradients are those of x0_hat before it is clipped.
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
        with torch.set_grad_enabled(method not in ("replace", "repaint")):
            xt = xt.detach().requires_grad_(torch.is_grad_enabled())
            eps_hat = denoiser(xt, torch.full((len(xt),), t))
            x0_hat = (xt - (1 - ab_t).sqrt() * eps_hat) / ab_t.sqrt()                # (15)
            resid = obs - project(x0_hat)
            if method in ("mcg", "dps"):
                gradient = norm_gradient(xt, resid)
            elif method == "pigdm":
                x0_hat = pigdm(xt, x0_hat, resid, ab_t)
            elif method == "mmps":
                x0_hat = mmps(xt, x0_hat, resid, project, cg)
        xt, x0_hat = xt.detach(), x0_hat.detach()
        if clip:
            x0_hat = x0_hat.clamp(-1, 1)
        mean = ab_s.sqrt() * beta_t * x0_hat + alpha_t.sqrt() * (1 - ab_s) * xt
        mean = mean / (1 - ab_t)                                                     # (7)
        sigma_t = (beta_t * (1 - ab_s) / (1 - ab_t)).sqrt()                        # (7): 0 at s = 0
        xs = mean + sigma_t * z                                                      # (6)
        if method in ("mcg", "dps"):
            xs = xs - zeta * gradient                                                # (MCG)
        if method in ("replace", "repaint", "mcg"):
            xs = xs - project(xs) + project(diffuse(obs, ab_s, z))                   # (replace)
        xt = xs
    return xt


def norm_gradient(xt, resid):
    """d|resid| / dx_t, each picture by itself; the papers' d|resid|^2 / dx_t / |resid| is twice it.

    The title's manifold: clean pictures lie near one, and pictures of level t on a shell around it.
    If the network is perfect and the manifold flat nearby, J projects onto its directions, up to a
    factor. This gradient is -J^T resid / |resid|, so it moves x_s along the shell. (replace) alone
    pushes x_s off it, to where the network was not trained, and such errors add up.
    """
    gradient, = torch.autograd.grad(resid.flatten(1).norm(dim=1).sum(), xt)
    return gradient


def pigdm(xt, x0_hat, resid, ab_t):
    """As mmps, but P C P is taken for (1 - alpha_bar_t) P, which is true of data ~ N(0, I).

    The paper adds its gradient to DDIM's x_s; here x0_hat moves, before the step of DDPM.
    """
    return x0_hat + torch.autograd.grad(x0_hat, xt, resid)[0] / ab_t.sqrt()          # (PiGDM)


def mmps(xt, x0_hat, resid, project, cg):
    """The mean of x_0 given x_t and obs, if x_0 given x_t were N(x0_hat, C): (MMPS) with C for J.

    By Tweedie's formula C = (1 - alpha_bar_t) / sqrt(alpha_bar_t) J, and the factor cancels. The
    pseudo-inverse is approximated by `cg` steps of conjugate gradients, a backward pass each. A
    trained network's J need be neither symmetric nor positive. Where the curvature p^T J p is 0 or
    less, there is no minimum along p; the step is then 0, and the next direction is r + p.
    """
    def dot(a, b):
        return (a * b).sum((1, 2, 3), keepdim=True)

    move, r = torch.zeros_like(resid), resid.detach()
    p, rr = r, dot(r, r)
    for _ in range(cg):
        Jp, = torch.autograd.grad(x0_hat, xt, p, retain_graph=True)      # J^T p: C is symmetric
        curvature = dot(p, Jp)
        step = torch.where(curvature > 0, rr / curvature.clamp(min=1e-30), 0)
        move, r = move + step * Jp, r - step * project(Jp)
        rr, last = dot(r, r), rr
        p = r + rr / last.clamp(min=1e-30) * p
    return x0_hat + move                                                             # (MMPS)


def measurement(task, size, resize=False):
    """(project, where): the task's projection P, and the pixels (1, 1, size, size) to be found."""
    everywhere = torch.ones(1, 1, size, size, dtype=torch.bool)
    if task == "colour":
        return lambda x: x.mean(1, keepdim=True).expand_as(x), everywhere
    if task in ("sr2", "sr4"):
        k = int(task[2])
        return lambda x: F.interpolate(F.avg_pool2d(x, k), scale_factor=float(k)), everywhere
    known = common.known_pixels(task, size, resize)
    return lambda x: x * known.to(x.device), ~known


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
    p = common.parser(__doc__, SCRIPT, "ckpt", "device", "dtype", "compile")
    p.set_defaults(Network=Network)
    add = p.add_argument
    add("--n", type=common.count, default=6, help="number of pictures")
    add("--task", default="box", help="a hole: box, half, thin, FILE (white stays); sr2, sr4: enlarge; colour: add it")
    add("--method", default=METHODS, choices=METHODS, nargs="+", help="methods to compare; gains are over the first")
    add("--zeta", type=common.pull, default=3.0, help="step of mcg and dps; 3 suits 50 to 100 steps, 1 suits 1000")
    add("--cg", type=common.natural, default=3, help="conjugate-gradient steps of mmps, a backward pass each")
    add("--steps", type=common.count, default=100, help="levels from noise to data, 1 to T; RePaint repeats some")
    add("--jump", type=common.count, default=10, help="RePaint's jump length j: steps to go up")
    add("--repeats", type=common.count, default=5, help="RePaint's resamplings r; 1 is plain replacement")
    add("--clip", action=argparse.BooleanOptionalAction, default=True, help="clip x0_hat to [-1, 1] in every step")
    add("--image", nargs="+", help="pictures, or folders of them (unset: assets/faces)")
    add("--resize", action="store_true", help="bring the hole picture to the network's size")
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv), TRAINED_BY)
    alpha_bar = schedule(args.schedule, args.T)
    project, where = measurement(args.task, args.size, args.resize)
    levels = common.even(args.T, args.steps)
    network = common.load(Network(**args.net), args)
    denoiser = Denoiser(network, alpha_bar, args.predict, args.bf16)
    original = common.open_images(args.image, args.n, args).to(args.device)
    obs, watched, results, table = project(original), common.watch(denoiser, args), {}, []
    for method in args.method:
        way = walk(levels, args.jump, args.repeats if method == "repaint" else 1)
        began, pictures = time.time(), []
        for noise, part in zip(common.noise_batches(len(obs), args, 64), obs.split(64)):
            x0 = sample(watched, noise(), alpha_bar, way, noise, part, project, method, args.zeta,
                        args.cg, args.clip)
            pictures.append(x0)
        seconds = (time.time() - began) / len(obs)
        x0 = common.to_float(common.to_uint8(torch.cat(pictures)))         # measured as it is saved
        off = (project(x0) - obs).square().mean((1, 2, 3)).sqrt() * 127.5
        nfe = sum(s < t for t, s in zip(way, way[1:]))
        backward = nfe * {"replace": 0, "repaint": 0, "mmps": args.cg}.get(method, 1)
        table += common.score_fills(
            x0, original, where, method=method, picture=list(range(len(x0))), nfe=nfe,
            backward=backward, seconds=seconds, off_by_of_255=off.tolist())
        results[method] = x0.cpu()
    common.add_gains(table)
    common.report(table, ["method"], args.out / "numbers.csv", over=["picture"])
    measured = obs if where.all() else torch.where(where.to(obs.device), 0.5, obs)
    common.save_samples(results, args, rows={"original": original, "measured": measured} | results)


if __name__ == "__main__":
    common.run(main)
