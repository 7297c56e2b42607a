r"""What learns faster? The training of cfg_afhq.py, with one thing changed each time, for equal CPU seconds.

Each training has one thread, so that its CPU seconds are those of one core; compiling comes before the
count. The learning rate rises and falls as in cfg_afhq.py, by the share of the seconds that are spent. A
row is the held-out loss of the averaged weights: the mean squared error of v at six levels from little
noise to much, on photographs of DATA/val with fixed noise. It is far less noisy than FID after so short a
training.

Rows are stored in OUT as JSON, beside the weights, which `bench/results.py seen --ckpts` takes. What is
there is not trained again, so several runs with different --only can share the work; a last run without it
collects the table.

Run
  python bench/study.py --data data/afhq --compile                     twenty minutes for each change and seed
  python bench/study.py --seconds 300 --only "the defaults" AdamW
"""
import collections
import contextlib
import json
import pathlib
import re
import sys
import time
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import cfg_afhq
import common
from bench import training

LEVELS = 50, 200, 350, 500, 700, 900


class PixelNorm(nn.Module):
    """x (B, C, H, W), at each pixel divided by its channels' root mean square (1710.10196)."""

    def forward(self, x):
        return F.normalize(x, dim=1, eps=1e-3) * x.shape[1] ** 0.5


# What differs from a default training: flags of cfg_afhq.py, and (owner, name, value) of what else is
# exchanged.
Change = collections.namedtuple("Change", "flags exchanged", defaults=([], []))
ADAMW = common, "Muon", training.adamw
PIXELNORM = cfg_afhq, "norm", lambda c: PixelNorm()
CHANGES = {
    "the defaults": Change(),
    "AdamW": Change(exchanged=[ADAMW]),
    "AdamW, half the learning rate": Change(["--lr", "1.2e-3"], [ADAMW]),
    "pixel norm": Change(exchanged=[PIXELNORM]),
    "half the learning rate": Change(["--lr", "1.2e-3"]),
    "twice the learning rate": Change(["--lr", "4.8e-3"]),
    "batch 16": Change(["--batch", "16"]),
    "batch 64": Change(["--batch", "64"]),
    "attention at 8 only": Change(["--attn", "8"]),
    "pixel norm, attention at 8 only, ch 48, mult 1 2 3": Change(
        ["--attn", "8", "--ch", "48", "--mult", "1", "2", "3"], [PIXELNORM]),
    "pixel norm, ch 64, mult 1 2 2": Change(["--ch", "64", "--mult", "1", "2", "2"], [PIXELNORM]),
    "pixel norm, patch 4, ch 64, attention at 8 only": Change(
        ["--patch", "4", "--ch", "64", "--attn", "8"], [PIXELNORM]),
}


def changed(change):
    """The context in which what the change exchanges is exchanged."""
    stack = contextlib.ExitStack()
    for owner, name, value in change.exchanged:
        stack.enter_context(mock.patch.object(owner, name, value))
    return stack


@torch.no_grad()
def held_out(denoiser, x0, y, alpha_bar, levels=LEVELS, batch=32):
    """The mean squared error of v for pictures x0 in [-1, 1] with labels y at each level.

    The noise is that of seed 1.
    """
    generator, errors = torch.Generator().manual_seed(1), []
    for t in levels:
        total, noise = 0.0, torch.randn(x0.shape, generator=generator)
        for part, eps, label in zip(x0.split(batch), noise.split(batch), y.split(batch)):
            xt = cfg_afhq.diffuse(part, alpha_bar[t], eps)
            eps_hat = denoiser(xt, torch.full((len(part),), t), label)
            total += (eps_hat - eps).square().sum().item()
        errors.append(total / x0.numel() / float(alpha_bar[t]))    # eps = std x_t + a v: v errs 1 / a as much
    return errors


def train(args, name, seed):
    """One training of args.seconds with the change of that name -> its row as a dict.

    OUT/NAME-seed.pt has the averaged weights.
    """
    change = CHANGES[name]
    own = cfg_afhq.parse_args(["--seed", str(seed), "--data", args.data, "--device", "cpu",
                               "--dtype", args.dtype, *change.flags])
    own.device, own.bf16 = args.device, args.bf16
    alpha_bar = cfg_afhq.schedule(own.schedule, own.T)
    images, labels, names = common.load_images(args.data, "train", own.size)
    held, held_labels, _ = common.load_images(args.data, "val", own.size)
    pick = torch.cat([(held_labels == k).nonzero()[:32, 0] for k in range(1, len(names) + 1)])
    own.net = common.network_keywords(cfg_afhq.Network, own, images, names)
    with changed(change):
        network, ema, optimizer = training.begin(own)
        run = torch.compile(network) if args.compile else network
        denoiser, averaged = (cfg_afhq.Denoiser(net, alpha_bar, own.predict, own.bf16) for net in (run, ema))
        batches = common.batches(images, labels, own.batch)
        cfg_afhq.loss(denoiser, *next(batches), alpha_bar).backward()             # compiles
        it, spent, began = 0, 0.0, time.process_time()
        while spent < args.seconds:
            it += 1
            own.iters = max(it, round(it * args.seconds / max(spent, 0.1)))
            training.step(own, it, network, ema, optimizer, denoiser, alpha_bar, *next(batches))
            spent = time.process_time() - began
        losses = held_out(averaged, common.to_float(held[pick]), held_labels[pick], alpha_bar)
    if args.compile:
        torch.compiler.reset()
    torch.save(dict(script="cfg_afhq", net=own.net, method={k: getattr(own, k) for k in common.METHOD},
                    names=names, iter=it, flags=dict(batch=own.batch), ema=ema.state_dict()),
               path_of(args, name, seed, "pt"))
    return dict(seed=seed, parameters=sum(p.numel() for p in network.parameters()), pictures=it * own.batch,
                **{f"t = {t}": v for t, v in zip(LEVELS, losses)})


def path_of(args, name, seed, suffix):
    """The file of a row: OUT/NAME-SECONDS-SEED.suffix."""
    return args.out / f"{re.sub('[^A-Za-z0-9]+', '_', name)}-{args.seconds:g}-{seed}.{suffix}"


def parse_args(argv=None):
    p = common.parser(__doc__, "study", "data", "dtype", "compile")
    p.add_argument("--seconds", type=common.positive, default=1200.0, help="CPU seconds of each training")
    p.add_argument("--seeds", type=common.count, default=2,
                   help="trainings with the seeds --seed, --seed + 1, ...")
    p.add_argument("--only", nargs="+", choices=CHANGES, metavar="CHANGE",
                   help="these changes only (unset: all)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.device = "cpu"
    args = common.prepare(args)
    torch.set_num_threads(1)
    rows = []
    for name in tqdm(args.only or CHANGES, "changes", disable=None):
        for seed in range(args.seed, args.seed + args.seeds):
            path = path_of(args, name, seed, "json")
            if not path.is_file():
                path.write_text(json.dumps(train(args, name, seed)))
            rows.append(dict(change=name, **json.loads(path.read_text())))
    common.save_table(rows, args.out / "study.csv")
    first = [np.mean([r[f"t = {t}"] for r in rows if r["change"] == rows[0]["change"]]) for t in LEVELS]
    print("| changed | seed | M parameters | pictures | " + " | ".join(f"t = {t}" for t in LEVELS)
          + " | mean ratio |\n|" + "-|" * 11)
    for r in rows:
        ratio = np.mean([r[f"t = {t}"] / f for t, f in zip(LEVELS, first)])
        print(f"| {r['change']} | {r['seed']} | {r['parameters'] / 1e6:.1f} | {r['pictures']:,} | "
              + " | ".join(f"{r[f't = {t}']:.4f}" for t in LEVELS) + f" | {ratio:.3f} |")
    print(f"{args.out / 'study.csv'}: {len(rows)} trainings")


if __name__ == "__main__":
    common.run(main)
