"""The training of cfg_afhq.py in three parts: speed.py times a step, results.py changes the batches.

tests/test_results.py checks that train(args) and cfg_afhq.train give the same weights, to the bit.

Run
  python bench/speed.py              seconds of begin's network and of step
  python bench/results.py mattered   train, with one thing changed each time
"""
import copy

import torch
from torch import nn

import cfg_afhq
import common


def adamw(parameters, bf16=False):
    """The optimiser to compare Muon with; called like common.Muon, whose products may be in bfloat16."""
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01)


def begin(args, layout=torch.channels_last):
    """A new network (args.net holds its keywords), the average of its weights, and its optimiser."""
    torch.manual_seed(args.seed)
    network = cfg_afhq.Network(**args.net).to(args.device, memory_format=layout)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = common.Muon(network.parameters(), args.bf16)
    return network, ema, optimizer


def step(args, it, network, ema, optimizer, denoiser, alpha_bar, x0, y):
    """Iteration it, counted from 1, on the pictures x0 with labels y -> their loss."""
    for group in optimizer.param_groups:
        group["lr"] = args.lr * min(1, it / 100, (args.iters + 1 - it) / (0.4 * args.iters))
    L = cfg_afhq.loss(denoiser, x0, y, alpha_bar, args.weight, args.loss, args.drop)
    optimizer.zero_grad()
    L.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    decay = min(args.ema, (1 + it) / (10 + it))
    for p_ema, p in zip(ema.parameters(), network.parameters()):
        p_ema.lerp_(p.detach(), 1 - decay)
    return L


def train(args, even=True, mirror=True):
    """Write args.out/model.pt; args as common.prepare leaves them, even and mirror as in common.batches."""
    alpha_bar = cfg_afhq.schedule(args.schedule, args.T)
    images, labels, names = common.load_images(args.data, "train", args.size)
    args.net = args.net or common.network_keywords(cfg_afhq.Network, args, images, names)
    network, ema, optimizer = begin(args)
    run = common.Run(args, names, network, ema, optimizer)
    denoiser = cfg_afhq.Denoiser(common.parallel(network, args), alpha_bar, args.predict, args.bf16)
    batches = common.batches(images.to(args.device), labels, args.batch, even, mirror)
    for it in run:
        x0, y = next(batches)
        run.step(it, step(args, it, network, ema, optimizer, denoiser, alpha_bar, x0, y))
