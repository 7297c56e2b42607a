r"""Train the classifier whose features fid.py measures with, and show what a FID in its features sees.

The network (fid.FaceNet) learns two things at once: the class of a face, and how much the picture was
blurred, made noisy, disarranged or mixed with another. The second keeps sharpness, grain and layout in
features that the classes alone would let collapse. assets/fid_faces.pt was trained by the first command.

Run
  python bench/train_classifier.py --data data/afhq            writes out/train_classifier/model.pt
  python bench/train_classifier.py --data drawn --iters 200    without photographs
  python bench/train_classifier.py --data data/afhq --study    no training: FID of damaged photographs
  python fid.py REAL FAKE --weights out/train_classifier/model.pt
"""
import io
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common
import fid

DAMAGE = ("blur", "noise", "moved", "mixed")


# ---------------------------------------------------------------- what the network is shown

def between(lo, hi, like):
    """A uniform number for each picture of `like`: (B, 1, 1, 1), from the global CPU generator."""
    return (lo + (hi - lo) * torch.rand(len(like), 1, 1, 1)).to(like.device)


def reflected(grid, side):
    """Places (B, H, W, 2) in -1..1 of F.affine_grid -> those inside that padding_mode="reflection" reads.

    Done here, since Apple's MPS has no kernel for that mode. Places within half a pixel of the edge move to
    the centre of the edge's pixel, so that no interpolation reaches outside.
    """
    inside = 1 - ((grid + 1) % 4 - 2).abs()                   # mirrored at -1 and 1, again and again
    return inside.clamp(1 / side - 1, 1 - 1 / side)


def augment(x):
    """x (B, 3, 64, 64) -> turned, zoomed, shifted, recoloured; every second has a box blanked."""
    turn, zoom = between(-0.2, 0.2, x).flatten(), between(0.85, 1.15, x).flatten()
    right, down = between(-0.12, 0.12, x).flatten(), between(-0.12, 0.12, x).flatten()
    rows = torch.stack([turn.cos() * zoom, -turn.sin() * zoom, right,
                        turn.sin() * zoom, turn.cos() * zoom, down], 1).view(-1, 2, 3)
    grid = reflected(F.affine_grid(rows, x.shape, align_corners=False), 64)
    warped = F.grid_sample(x, grid, align_corners=False)
    x = torch.where(between(0, 1, x) < 0.7, warped, x)        # the rest stays as sharp as it is
    grey = x.mean(1, keepdim=True)
    x = (grey + between(0.6, 1.3, x) * (x - grey)) * between(0.75, 1.2, x) + between(-0.2, 0.2, x)
    axis = torch.arange(64, device=x.device)
    near = [(axis - between(0, 64, x)[..., 0]).abs() < 12 for _ in range(2)]   # (B, 1, 64) each
    hole = near[0][..., None] & near[1][..., None, :] & (between(0, 1, x) < 0.5)
    return x.masked_fill(hole, 0.0)


def damage(x, y):
    """x (B, 3, 64, 64), y (B,) -> x with every second picture damaged; amounts of DAMAGE (B, 4) in 0..1."""
    b, device = len(x), x.device
    amount = F.one_hot(torch.randint(8, (b,)), 8)[:, :4] * torch.rand(b, 4)   # at most one is not 0
    amount[:, 2].ceil_()                                      # parts are moved or they are not
    order = torch.argsort(y.cpu() + 0.5 * torch.rand(b))      # neighbours in it share their class,
    other = torch.empty_like(order).scatter_(0, order, order.roll(1)).to(device)   # but for K of them
    move = torch.where(between(0, 1, x) < 0.5, x.roll((32, 32), (2, 3)), x.flip(2))
    amount = amount.to(device)
    blur, noise, moved, mixed = amount.T[..., None, None, None]               # (B, 1, 1, 1) each
    bell = torch.arange(-4, 5, device=device) ** 2 / (2 * (0.05 + 1.5 * blur[:, 0, 0]) ** 2)
    bell = bell.neg().softmax(1).repeat_interleave(3, 0)[:, None, None]       # (3 B, 1, 1, 9)
    flat = F.pad(x, (4, 4, 4, 4), mode="reflect").reshape(1, 3 * b, 72, 72)   # a kernel for each picture
    flat = F.conv2d(F.conv2d(flat, bell, groups=3 * b), bell.transpose(2, 3), groups=3 * b)
    xt = flat.view_as(x) + 0.2 * noise * torch.randn(x.shape).to(device)
    return torch.where(moved > 0, move, xt + 0.5 * mixed * (x[other] - x)), amount


def loss(network, x0, y):
    """Cross entropy of the class, y (B,) in 1..K, plus the squared error of the amounts of damage."""
    x0, amount = damage(augment(x0), y)
    _, class_logits, amount_hat = network(x0.contiguous(memory_format=torch.channels_last))
    wrong = (amount_hat.float() - amount).square().sum(1).mean()
    return F.cross_entropy(class_logits.float(), y - 1) + 4 * wrong   # 4: of like size at the start


# ---------------------------------------------------------------- training

def train(args):
    """Train on DATA/train; write OUT/model.pt in fp16; say what it recognises of DATA/val."""
    torch.manual_seed(args.seed)
    x, y, names = common.load_images(args.data, "train", 64)
    x = x.expand(-1, 3, -1, -1)
    network = fid.FaceNet(len(names)).to(args.device, memory_format=torch.channels_last)
    big, small = ([p for p in network.parameters() if (p.ndim > 1) == many] for many in (True, False))
    optimizer = torch.optim.AdamW([{"params": big, "weight_decay": 0.05}, {"params": small}],
                                  weight_decay=0.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.iters, pct_start=0.1)
    batches = common.batches(x.to(args.device), y, args.batch)
    for it in (bar := tqdm(range(1, args.iters + 1), "train", disable=None)):
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            L = loss(network, *next(batches))
        optimizer.zero_grad()
        L.backward()
        optimizer.step()
        plan.step()
        if it % 50 == 0 or it == args.iters:
            bar.set_postfix(loss=f"{L.item():.3f}")
            if not torch.isfinite(L):
                common.stop(f"the loss at iteration {it} is not finite; train again with "
                            f"--lr {args.lr / 3:.0e}.")
    extractor = fid.Extractor("faces", "faces", "", network.eval(), names, args.device)
    part, _ = fid.features(x[torch.randperm(len(x))[:4000]], extractor)   # enough for means and spreads
    spread = part.std(0, ddof=1)
    network.centre.copy_(torch.from_numpy(part.mean(0)))
    # don't blow up dead features
    network.spread.copy_(torch.from_numpy(np.maximum(spread, 0.1 * np.median(spread))))
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.cpu().state_dict().items()}
    path = args.out / "model.pt"
    torch.save({"script": "fid", "names": names, "iter": args.iters, "model": state}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    x, y, _ = common.load_images(args.data, "val", 64)
    _, p = fid.features(x, fid.load_extractor("faces", path, args.device))
    print(f"held-out photographs: {fid.class_counts(np.array(names)[y - 1], p, names)}")
    right = (p.argmax(1) + 1 == y.numpy()).mean()
    print(f"{path}: {right:.2%} of {len(x)} recognised, {args.iters} steps, {time.time() - args.began:.1f} s")


# ---------------------------------------------------------------- what a FID in these features sees

def jpeg(x):
    """uint8 (N, 3, H, W), saved as JPEG of quality 75 and read again."""
    pictures = []
    for p in x.permute(0, 2, 3, 1).contiguous().numpy():
        file = io.BytesIO()
        Image.fromarray(p).save(file, "JPEG", quality=75)
        pictures.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def noisy(x):
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return (x + 8 * noise).round().clamp(0, 255).to(torch.uint8)


def a_little_blurred(x):
    return torch.lerp(x.float(), gaussian_blur(x, 9, 1.0).float(), 0.15).round().to(torch.uint8)


def one_eye_over_the_other(x):
    x = x.clone()
    x[:, :, 20:32, 36:50] = x[:, :, 20:32, 14:28]            # where eyes are in most faces of AFHQ at 64 x 64
    return x


def quarters_swapped(x):
    x = x.clone()
    x[::10] = x[::10].roll((32, 32), (2, 3))
    return x


def study(args):
    """FID and KID of n photographs of DATA/train against DATA/val, undamaged (the floor) and damaged."""
    extractor = fid.load_extractor("faces", args.weights, args.device)
    real, real_classes, _ = common.read_folder(args.data, "val")
    pool, pool_classes, _ = common.read_folder(args.data, "train")
    real = fid.features(real, extractor)[0]
    like = [real_classes[i * len(real_classes) // args.n] for i in range(args.n)]   # in val's shares
    rows = fid.floor_draws(np.arange(len(pool)), pool_classes, like, args.draws, args.seed)
    kinds = sorted(set(pool_classes))
    cases = {
        "nothing (the floor)": lambda x: x,
        "JPEG, quality 75": jpeg,
        "one eye over the other": one_eye_over_the_other,
        "blur, sd 0.5 px": lambda x: gaussian_blur(x, 9, 0.5),
        "blur, sd 0.8 px": lambda x: gaussian_blur(x, 9, 0.8),
        "15 % of a blur, sd 1 px": a_little_blurred,
        "8 / 255 brighter": lambda x: (x.int() + 8).clamp(max=255).to(torch.uint8),
        "noise, sd 8 / 255": noisy,
        "quarters swapped in 1 of 10": quarters_swapped,
        f"no {kinds[-1]} at all": None,
        "a quarter of them, 4 times each": lambda x: x[::4].repeat(4, 1, 1, 1),
    }
    table = []
    for name, change in cases.items():
        for draw, chosen in enumerate(rows):
            if change is None:
                rest = [c for c in like if c != kinds[-1]]
                chosen = fid.floor_draws(np.arange(len(pool)), pool_classes, (rest * args.n)[:args.n], 1,
                                         args.seed + draw)[0]
            values = fid.features((change or (lambda x: x))(pool[chosen]), extractor)[0]
            table.append({"damage": name, "seed": draw, "FID": fid.frechet(real, values),
                          "KID x 1000": 1000 * fid.kid(real, values)})
    print(f"{args.n} photographs of {args.data}/train against the {len(real)} of val, {args.draws} draws")
    common.report(table, ["damage"], args.out / "damage.csv")


def parse_args(argv=None):
    p = common.parser(__doc__, "train_classifier", "data", "device", "dtype")
    p.add_argument("--iters", type=common.count, default=2000, help="optimiser steps")
    p.add_argument("--batch", type=common.count, default=64, help="pictures per optimiser step")
    p.add_argument("--lr", type=common.positive, default=2e-3, help="peak learning rate of AdamW")
    p.add_argument("--study", action="store_true", help="don't train: how far damaged photographs are")
    p.add_argument("--weights",
                   help="with --study: file of the classifier's weights (unset: the one in assets/)")
    p.add_argument("--n", type=common.count, default=600, help="with --study: number of photographs")
    p.add_argument("--draws", type=common.count, default=3, help="with --study: draws of photographs")
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv))
    try:
        (study if args.study else train)(args)
    except ValueError as error:
        common.stop(f"{error}.")


if __name__ == "__main__":
    common.run(main)
