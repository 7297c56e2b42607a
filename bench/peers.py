"""Speed, side by side in one run: ours against the course's network, and against two widely used libraries.

The contenders of a comparison take turns, one call each in a round, so that whatever else the machine does
meets all of them; two calls of each warm up first. A row gives medians over the rounds. Its last column is
the contender's seconds over those of ours in the same round, and their range: above 1 it is slower than
ours. It is taken by the wall clock, or by CPU seconds where a single CPU thread works, as in speed.py. A
step is a training step on given pictures, a forward is a network call without gradient and without
dropout.

course    KAIST's network (Course, batch 8) as the course runs it: fp32, contiguous memory, eager, Adam,
          uniform loss of eps, no average of the weights. Ours is cfg_afhq.py with the flags that make the
          same size, as it trains: channels_last, bf16 where native, clipping, its optimiser, the average
          of the weights.
default   The default network of cfg_afhq.py and its batch, against UNet2DModel of diffusers and Unet of
          lucidrains' denoising-diffusion-pytorch, at the width where they have about as many parameters.
          They have no patches, so they work at the full side, with added levels of the first width; their
          other levels, and the sides at which they attend, are ours. lucidrains' also has linear attention
          at the other sides, and takes no labels. All take one and the same step: our loss, clipping,
          AdamW and the average of the weights, first in fp32 as they come, then with channels_last and
          bf16 where native. "ours as trained" has the optimiser of cfg_afhq.py.

fp32 is as torch has it by default: on a GPU its convolutions use TF32.

Run
  python bench/peers.py                          both comparisons, five rounds
  python bench/peers.py --only course --compile  with a row of ours compiled
  OMP_NUM_THREADS=1 python bench/peers.py        one core

It writes OUT/peers.csv, and OUT/peers_calls.csv with every call, and prints a table as Markdown. It needs
torch 2.1 and the packages diffusers, denoising-diffusion-pytorch and accelerate; the rows of a library
that isn't there are left out.
"""
import bisect
import collections
import copy
import functools
import importlib
import math
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import cfg_afhq
import common
from bench import speed, training

COURSE, DEFAULT = [*speed.COURSE, "--dropout", "0.1", "--batch", "8"], []       # flags of cfg_afhq.py
LABELS = ["cat", "dog", "wild"]
Contender = collections.namedtuple("Contender", "name network step forward")  # step() and forward() work


# ---------------------------------------------------------------- the course's network, from its description

class Attention(nn.Module):
    """One head over all pixels: x + proj(softmax(q k / sqrt(c)) v)."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, c), c)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))              # (B, c, pixels)
        share = torch.softmax(torch.bmm(q.transpose(1, 2), k) * x.shape[1] ** -0.5, 2)  # to, from pixel
        return x + self.proj(torch.bmm(v, share.transpose(1, 2)).view_as(x))


class ResBlock(nn.Module):
    """Residual block; the embedding of t is added after the first convolution. Then perhaps attention."""

    def __init__(self, c_in, c_out, c_time, attention, dropout):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(math.gcd(32, c_in), c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(math.gcd(32, c_out), c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time, self.dropout = nn.Linear(c_time, c_out), nn.Dropout(dropout)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out) if attention else nn.Identity()

    def forward(self, x, emb):
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h)) + self.time(emb * torch.sigmoid(emb))[:, :, None, None]
        h = self.norm2(h)
        h = self.conv2(self.dropout(h * torch.sigmoid(h)))
        return self.attention(self.skip(x) + h)


class Course(nn.Module):
    """The U-Net of KAIST's CS492(D). Where there are classes, training drops a tenth of the labels."""

    def __init__(self, size, channels, classes=None, ch=128, mult=(1, 2, 2, 2), blocks=4, attn=(32,),
                 dropout=0.1):
        super().__init__()
        c_time, c, sides = 4 * ch, ch, [size // 2 ** i for i in range(len(mult))]
        self.time = nn.Sequential(nn.Linear(256, c_time), nn.SiLU(), nn.Linear(c_time, c_time))
        self.label = nn.Embedding(classes + 1, c_time) if classes else None
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [ch]
        for i, (side, m) in enumerate(zip(sides, mult)):
            for _ in range(blocks):
                self.down.append(ResBlock(c, ch * m, c_time, side in attn, dropout))
                c = ch * m
                skips.append(c)
            if i < len(mult) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.mid = nn.ModuleList([ResBlock(c, c, c_time, attention, dropout) for attention in (True, False)])
        for i, (side, m) in reversed(list(enumerate(zip(sides, mult)))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), ch * m, c_time, side in attn, dropout))
                c = ch * m
            if i > 0:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
        self.norm, self.conv_out = nn.GroupNorm(math.gcd(32, c), c), nn.Conv2d(c, channels, 3, padding=1)

    def forward(self, xt, t, y=None):
        """xt (B, C, H, W), t (B,), counted from 0, y (B,) in 0..classes -> eps_theta (B, C, H, W)."""
        freq = torch.exp(-math.log(1e4) * torch.arange(128, device=t.device) / 128)
        angle = t.float()[:, None] * freq
        emb = self.time(torch.cat([angle.cos(), angle.sin()], 1))
        if self.label is not None:
            emb = emb + self.label(y * (torch.rand(len(y), device=y.device) >= 0.1) if self.training else y)
        h = self.conv_in(xt)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, emb)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), emb) if isinstance(layer, ResBlock) else layer(h)
        h = self.norm(h)
        return self.conv_out(h * torch.sigmoid(h))


# ---------------------------------------------------------------- the libraries' networks

class Peer(nn.Module):
    """A library's network, called like ours."""

    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, xt, t, y):
        return self.call(self.net, xt, t, y)


def diffusers(UNet2DModel, own, width):
    """UNet2DModel at the settings of ours, with width channels at the first level."""
    mult, attends = levels(own)
    net = UNet2DModel(
        sample_size=own.size, layers_per_block=own.blocks, dropout=own.dropout,
        num_class_embeds=len(LABELS) + 1,
        norm_num_groups=math.gcd(width, 32), block_out_channels=[width * m for m in mult],
        down_block_types=["AttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        up_block_types=["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(attends)])
    return Peer(net, lambda net, xt, t, y: net(xt, t, class_labels=y).sample)


def lucidrains(Unet, own, width):
    """Unet at the settings of ours, with width channels at the first level; it has two blocks at each."""
    mult, attends = levels(own)
    net = Unet(width, dim_mults=mult, dropout=own.dropout, full_attn=tuple(attends))
    return Peer(net, lambda net, xt, t, y: net(xt, t))


def levels(own):
    """The channel factor of each level without patches, and whether ours attends at its side."""
    mult = [1] * round(math.log2(own.patch)) + list(own.mult)
    return mult, [own.size // 2 ** i in own.attn for i in range(len(mult))]


PEERS = {"diffusers": ("diffusers", "UNet2DModel", diffusers),
         "lucidrains": ("denoising_diffusion_pytorch", "Unet", lucidrains)}


def installed(own):
    """{name: build(width)} of the libraries that are here, with a sentence on stderr for each that isn't."""
    found = {}
    for name, (package, network, build) in PEERS.items():
        try:
            found[name] = functools.partial(build, getattr(importlib.import_module(package), network), own)
        except (ImportError, RuntimeError, AttributeError) as error:  # diffusers makes RuntimeErrors of them
            why = str(error).splitlines()[0]
            print(f"({package} can't be imported ({why}), so its rows are left out)", file=sys.stderr)
    if found and own.patch > 1:
        print(f"{' and '.join(found)} work at side {own.size}, "
              f"ours at side {own.size // own.patch} in patches")
    return found


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def width_for(build, wanted):
    """The roundest width where build(width) has `wanted` parameters within 5 %, or the nearest even one."""
    def count(width):
        with common.without_values():
            return parameters(build(width))

    for multiple in (32, 16, 8, 4, 2):
        widths = range(multiple, 1024, multiple)
        i = max(1, bisect.bisect_left(widths, wanted, hi=len(widths) - 1, key=count))
        best = min(widths[i - 1:i + 1], key=lambda width: abs(count(width) - wanted))
        if abs(count(best) / wanted - 1) <= 0.05:
            break
    return best


# ---------------------------------------------------------------- contenders

def settings(flags, args, bf16):
    """The flags of cfg_afhq.py as its training has them, and a batch: x0, levels t (on the CPU), labels y."""
    own = cfg_afhq.parse_args(flags)
    own.device, own.seed, own.bf16 = args.device, args.seed, bf16
    own.x0 = torch.rand(own.batch, 3, own.size, own.size, device=own.device) * 2 - 1
    own.t, own.y = torch.full((own.batch,), 500), torch.ones(own.batch, dtype=torch.long, device=own.device)
    own.net = common.network_keywords(cfg_afhq.Network, own, own.x0, LABELS)
    return own


def trained(name, own, network, ema, optimizer, compiled=False):
    """A contender that takes the step of cfg_afhq.py and evaluates the average of the weights."""
    alpha_bar = cfg_afhq.schedule(own.schedule, own.T)
    run = torch.compile if compiled else lambda net: net
    learns, averaged = (cfg_afhq.Denoiser(run(net), alpha_bar, own.predict, own.bf16)
                        for net in (network, ema))

    def step():
        training.step(own, 1000, network, ema, optimizer, learns, alpha_bar, own.x0, own.y)

    return Contender(name, network, step, torch.no_grad()(lambda: averaged(own.x0, own.t, own.y)))


def taught(own):
    """The course's contender: its network and its step."""
    torch.manual_seed(own.seed)
    network = Course(**common.network_keywords(Course, own, own.x0, LABELS)).to(own.device)
    still, optimizer = copy.deepcopy(network).eval(), torch.optim.Adam(network.parameters(), lr=2e-4)
    alpha_bar, t = cfg_afhq.schedule("linear")[1:].float().to(own.device), own.t.to(own.device)

    def step():
        t = torch.randint(len(alpha_bar), (own.batch,), device=own.device)
        eps, ab_t = torch.randn_like(own.x0), alpha_bar[t][:, None, None, None]
        L = F.mse_loss(network(ab_t.sqrt() * own.x0 + (1 - ab_t).sqrt() * eps, t, own.y), eps)
        optimizer.zero_grad()
        L.backward()
        optimizer.step()

    return Contender("course", network, step, torch.no_grad()(lambda: still(own.x0, t, own.y)))


def course(args):
    """The first comparison: its title, the settings of ours, and the contenders, ours first."""
    own = settings(COURSE, args, common.bf16("auto", args.device))
    contenders = [trained("ours", own, *training.begin(own))]
    if args.compile:
        contenders.append(trained("ours compiled", own, *training.begin(own), compiled=True))
    yield "course", own, [*contenders, taught(own)]


def default(args):
    """The second comparison, in fp32 and then with channels_last and bf16 where native."""
    peers = installed(settings(DEFAULT, args, False))
    for layout in (torch.contiguous_format, torch.channels_last):
        last = layout == torch.channels_last
        bf16 = last and common.bf16("auto", args.device)
        own = settings(DEFAULT, args, bf16)
        network, ema, optimizer = training.begin(own, layout)
        contenders = [trained("ours", own, network, ema, training.adamw(network.parameters()))]
        if last:
            contenders.append(trained("ours as trained", own, *training.begin(own, layout)))
        for name, build in peers.items():
            width = width_for(build, parameters(network))
            torch.manual_seed(own.seed)
            net = build(width).to(own.device, memory_format=layout)
            average = copy.deepcopy(net).eval().requires_grad_(False)
            optimizer = training.adamw(net.parameters())
            contenders.append(trained(f"{name} of width {width}", own, net, average, optimizer))
        yield f"default {'bf16' if bf16 else 'fp32'}{' channels_last' if last else ''}", own, contenders


# ---------------------------------------------------------------- clock

def alternate(works, rounds, device, title=None):
    """works {name: work}: each twice, then once in every round -> {name: [its (wall, CPU seconds), ...]}."""
    def call(work):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    for work in works.values():
        call(work)
        call(work)
    calls = [[call(work) for work in works.values()] for _ in tqdm(range(rounds), title, disable=None)]
    return dict(zip(works, zip(*calls)))


def gflop(network, own):
    """10^9 floating-point operations of the products and convolutions for one picture, forwards."""
    from torch.utils.flop_counter import FlopCounterMode  # torch 2.1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).eval().to("meta")(*(v[:1].to("meta") for v in (own.x0, own.t, own.y)))
    return counter.get_total_flops() / 1e9


def summary(calls, device):
    """{name: its (wall, CPU) seconds}, ours first -> {name: medians, and the range of the ratios to ours}."""
    first = [speed.counted(device, *call) for call in next(iter(calls.values()))]
    rows = {}
    for name, own in calls.items():
        wall, cpu = (statistics.median(column) for column in zip(*own))
        ratios = [speed.counted(device, *call) / base for call, base in zip(own, first)]
        rows[name] = dict(wall=wall, cpu=cpu, cpu_per_wall=statistics.median(c / w for w, c in own),
                          ratio=statistics.median(ratios), ratio_least=min(ratios), ratio_most=max(ratios))
    return rows


COMPARISONS = {"course": course, "default": default}


def parse_args(argv=None):
    p = common.parser(__doc__, "peers", "device", "compile")
    add = p.add_argument
    add("--only", choices=COMPARISONS, help="one comparison (unset: both)")
    add("--rounds", type=common.count, default=5, help="calls of each contender that are timed")
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv))
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{args.rounds} rounds")
    rows, each = [], []
    for name in [args.only] if args.only else COMPARISONS:
        for title, own, contenders in COMPARISONS[name](args):
            facts = {c.name: dict(parameters=parameters(c.network), gflop=gflop(c.network, own))
                     for c in contenders}
            for work in ("step", "forward"):
                works = {c.name: getattr(c, work) for c in contenders}
                calls = alternate(works, args.rounds, args.device, f"{title}, {work}")
                for contender, row in summary(calls, args.device).items():
                    key = dict(comparison=title, work=work, contender=contender)
                    rows.append(key | facts[contender] | dict(batch=len(own.x0)) | row)
                    each += [key | dict(round=i, wall=wall, cpu=cpu)
                             for i, (wall, cpu) in enumerate(calls[contender], 1)]
                common.save_table(rows, args.out / "peers.csv")
                common.save_table(each, args.out / "peers_calls.csv")
            torch.compiler.reset()
    print("| comparison, batch | work | contender | parameters, M | GFLOP a picture | s | CPU s | "
          "CPU s / s | times ours |\n|-|-|-|-|-|-|-|-|-|")
    for r in rows:
        print(f"| {r['comparison']}, {r['batch']} | {r['work']} | {r['contender']} | "
              f"{r['parameters'] / 1e6:.2f} | {r['gflop']:.3g} | "
              f"{r['wall']:.3g} | {r['cpu']:.3g} | {r['cpu_per_wall']:.2f} | "
              f"{r['ratio']:.2f} ({r['ratio_least']:.2f} to {r['ratio_most']:.2f}) |")
    print(f"{args.out / 'peers.csv'}: {len(rows)} rows")


if __name__ == "__main__":
    common.run(main)
