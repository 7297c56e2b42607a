r"""Measure the faces that cfg_afhq.py makes: each table about them in RESULTS.md is one command here.

A row is n pictures of each class, made from one seed. fid.py (its `faces` network) compares them with the
photographs in DATA/val, in the same shares of classes. The floor compares as many photographs of DATA/train
with the same ones. "Asked" is the share of pictures that the classifier assigns to the class that was asked
for. The +- is the standard deviation over seeds of the samples; with --seeds 1 it is the jackknife's
standard error. It says nothing about the spread between trainings: each row samples from one.

Rows are stored in OUT/TABLE as JSON. A run that was stopped goes on where it stopped, and a row is measured
again if the weights, the photographs or the precision have changed. Several runs with different --seed or
--only can therefore share the work; a last run without --only then collects all rows.

Run
  python bench/results.py solvers --compile     FID against network evaluations, at scale 1
  python bench/results.py solvers --only "ddpm 1000" --seeds 1      the row too slow for three seeds
  python bench/results.py solvers --n 1667 --only "dpm++2m 10" "ddim 50"           5,001 pictures for each row
  python bench/results.py scales                FID and agreement with the label against the guidance scale
  python bench/results.py scales --only 0 --ckpts assets/ddpm_afhq.pt         the network without labels
  python bench/results.py choose --seeds 1      scales and intervals, compared with training photographs
  python bench/results.py intervals             high scales, guided at the middle levels only (--interval)
  python bench/results.py seen --ckpts a.pt b.pt       FID against the number of pictures seen in training
  python bench/results.py mattered              train again with one thing changed each time, then FID
  python bench/results.py copies                distances of samples to the nearest training photographs

It writes OUT/TABLE.csv and a curve OUT/TABLE.png, and prints the table as Markdown; for solvers and mattered
it also writes OUT/TABLE-faces.png. With --only the names are OUT/TABLE-only.csv and .png.
"""
import collections
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import textwrap
import time

import matplotlib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import cfg_afhq
import common
import ddpm_afhq
import fid
from bench import training

SHIPPED = pathlib.Path(common.__file__).parent / "assets" / "cfg_afhq.pt"
SOLVERS = {"ddim": [10, 20, 50, 100], "dpm1": [10, 20, 50], "dpm2": [10, 20, 50],
           "dpm++2m uniform": [10, 20, 50], "dpm++2m": [5, 10, 20, 50]}
SCALES = [0, 1, 2, 3, 5, 7.5]
EVERYWHERE, MIDDLE = (0.0, math.inf), tuple(cfg_afhq.parse_args([]).interval)   # guided levels; the default
INTERVALS = [("dpm++2m", 20, scale, MIDDLE) for scale in (2.0, 4.0, 7.5, 8.5)]
INTERVALS += [("dpm2", 20, scale, MIDDLE) for scale in (2.0, 3.0)]
INTERVALS += [(s, 50, 7.5, MIDDLE) for s in ("dpm++2m", "ddim")]
INTERVALS += [("dpm++2m", 20, 8.5, EVERYWHERE), ("ddim", 50, 8.5, EVERYWHERE)]
INTERVALS += [("ddpm", steps, 4.0, MIDDLE) for steps in (100, 250)]
CHOICES = [("dpm++2m", 20, scale, interval)
           for interval in [(0.5, 1.0), (1.0, 2.0), (0.2, 1.0), (0.2, 2.0), (0.5, 2.0), (0.3, 3.0),
                            (0.5, 5.0), EVERYWHERE]
           for scale in (1.5, 2.0, 3.0, 4.0, 7.5)]
CHOICES += [(s, 50, scale, interval) for s in ("ddim", "dpm++2m")
            for interval in [(0.2, 2.0), (0.5, 2.0), (0.3, 3.0)] for scale in (2.0, 4.0, 7.5)]
CHOICES += [("dpm2", 20, scale, MIDDLE) for scale in (1.5, 2.0, 3.0, 4.0)]

# What differs from a default training: flags of cfg_afhq.py, keywords of common.batches, or which weights
# sample.
Change = collections.namedtuple("Change", "flags batches ema", defaults=([], {}, True))
CHANGES = {
    "the defaults": Change(),
    "eps, linear, uniform (the paper)": Change(["--predict", "eps", "--schedule", "linear",
                                                "--weight", "uniform"]),
    "eps for v": Change(["--predict", "eps"]),
    "weight uniform": Change(["--weight", "uniform"]),
    "schedule linear": Change(["--schedule", "linear"]),
    "no attention but in the middle": Change(["--attn"]),
    "half the learning rate": Change(["--lr", "1.2e-3"]),
    "twice the learning rate": Change(["--lr", "4.8e-3"]),
    "dropout 0.1": Change(["--dropout", "0.1"]),
    "not mirrored": Change(batches={"mirror": False}),
    "classes as they come": Change(batches={"even": False}),
    "no EMA": Change(ema=False),            # the last weights of the defaults' training
    "patch 1, half the channels": Change(["--patch", "1", "--ch", "16", "--mult", "1", "2", "4", "8"]),
    "the defaults, seed 1": Change(["--seed", "1"]),
    "twice the learning rate, seed 1": Change(["--lr", "4.8e-3", "--seed", "1"]),
}
ROWS = {             # what --only can name, for each table
    "solvers": {f"{s} {n}": (s, n, 1.0) for s, steps in [*SOLVERS.items(), ("ddpm", [1000])] for n in steps},
    "scales": {f"{s:g}": ("dpm++2m", 20, float(s)) for s in SCALES},
    **{table: {f"{s} {n} at {scale:g}, {lo:g} to {hi:g}": (s, n, scale, (lo, hi))
               for s, n, scale, (lo, hi) in rows}
       for table, rows in {"intervals": INTERVALS, "choose": CHOICES}.items()},
    "mattered": CHANGES,
}

Model = collections.namedtuple("Model", "denoiser alpha_bar net names seen hash")
Row = collections.namedtuple("Row", "name solver steps scale seed interval", defaults=[EVERYWHERE])


def photographs(args, split):
    """The photographs of DATA/split at 64 x 64: uint8 (N, 3, 64, 64), and the class of each."""
    x, y, names = common.load_images(args.data, split, 64)
    return x, np.array([names[k - 1] for k in y])


class Reference:
    """The photographs of --data as features of fid.py's network, computed once; score compares with them.

    Settings are chosen on DATA/train (the floor is then DATA/val's) and reported on DATA/val.
    """

    def __init__(self, args):
        self.extractor = fid.load_extractor(device=args.device)
        splits = ("train", "val") if args.table == "choose" else ("val", "train")
        self.real, self.other = (self.read(args, split) for split in splits)
        fewest = min(collections.Counter(self.other[1]).values())
        if args.n > fewest:
            common.stop(f"--n {args.n} is more than the {fewest} photographs of a class in {splits[1]}, "
                        "from which the floor is drawn.")
        parts = [self.extractor.sha.encode(), self.real[0].tobytes(), self.other[0].tobytes()]
        self.hash = hashlib.sha256(b"".join(parts)).hexdigest()[:12]

    def read(self, args, split):
        x, classes = photographs(args, split)
        return fid.cached_features(x, self.extractor, args.out / "cache")[0], classes

    def score(self, x, classes, labelled=True):
        """Pictures x uint8 (N, 3, H, W), sorted by class, and their N classes -> dict of a row's numbers."""
        values, p = fid.features(x, self.extractor)
        keep = fid.rows_in_shares(self.real[1], classes, 0)
        found = fid.compare(self.real[0][keep], values, fid.floor_draws(*self.other, classes, 5, 0))
        numbers = dict(floor=found["fid"]["floor"], floor_sd=found["fid"]["floor_sd"])
        for kind in ("fid", "kid"):
            numbers |= {kind: found[kind]["value"], f"{kind}_se": found[kind]["se"]}
        if labelled and set(classes) <= set(self.extractor.classes):
            numbers["asked"] = (np.array(self.extractor.classes)[p.argmax(1)] == classes).mean()
        return {k: float(v) for k, v in numbers.items()} | {k: found[k] for k in ("n_fake", "n_real")}


def load_model(args, path=None, classes=None):
    """The Model in a checkpoint (unset: cfg_afhq.py's shipped one). classes: those of the photographs."""
    path = path or SHIPPED
    flags = ["--ckpt", str(path), "--out", str(args.out), "--device", str(args.device), "--dtype", args.dtype]
    script = common.read_checkpoint(path, cfg_afhq.TRAINED_BY + ddpm_afhq.TRAINED_BY)["script"]
    labelled = script in cfg_afhq.TRAINED_BY
    if not labelled and (args.table, args.only) != ("scales", ["0"]):
        common.stop(f"{path} was trained without labels, so it has one row: scales --only 0.")
    module = cfg_afhq if labelled else ddpm_afhq
    own = common.prepare(module.parse_args(flags + ["--compile"] * args.compile), module.TRAINED_BY)
    if own.net["size"] != 64:
        common.stop(f"{path} makes pictures of side {own.net['size']}; fid.py's faces network takes 64 x 64.")
    if classes is not None and set(own.names) != set(classes):
        common.stop(f"{args.data} has the classes {', '.join(sorted(set(classes)))}; {path} knows "
                    f"{', '.join(own.names)}.")
    parts = [p.numpy().tobytes() for p in own.checkpoint["ema"].values()]
    parts += [f"{own.bf16} {own.compile}".encode()]
    alpha_bar = cfg_afhq.schedule(own.schedule, own.T)
    network = common.load(module.Network(**own.net), own)
    call = network if labelled else lambda xt, t, y: network(xt, t)
    denoiser = cfg_afhq.Denoiser(call, alpha_bar, own.predict, own.bf16)
    seen = own.checkpoint["iter"] * own.checkpoint.get("flags", {}).get("batch", 32)
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    return Model(denoiser, alpha_bar, own.net, own.names, seen, digest)


def faces(model, n, row, device, batch=64):
    """n pictures of each class, uint8 (K n, C, H, W), as cfg_afhq.py makes them; K n up to 10,000.

    row.solver: one of cfg_afhq.py's, or one and the spacing of its levels ("dpm++2m uniform").
    """
    solver, *spacing = row.solver.split()
    levels, pictures = cfg_afhq.levels_for(solver, model.alpha_bar, row.steps, *spacing), []
    shape = model.net["channels"], model.net["size"], model.net["size"]
    for k in range(1, len(model.names) + 1):
        for i in range(0, n, batch):
            m, first = min(batch, n - i), 10_000 * row.seed + i + (0 if row.scale else n * (k - 1))
            noise = common.image_noise(shape, first, m, device)
            y = torch.full((m,), k if row.scale else 0, device=device)
            x0 = cfg_afhq.sample(model.denoiser, noise(), y, model.alpha_bar, levels, noise, row.scale,
                                 solver, lo=row.interval[0], hi=row.interval[1])
            pictures.append(common.to_uint8(x0).cpu())
    return torch.cat(pictures)


def path_of(args, row, suffix):
    """The file of a row: OUT/TABLE/settings.suffix."""
    interval = row.interval if row.interval != EVERYWHERE else ()
    settings = row.name, row.solver, row.steps, row.scale, *interval, args.n, row.seed
    settings = [f"{x:g}" if isinstance(x, float) else str(x) for x in settings]
    return args.out / args.table / f"{re.sub('[^A-Za-z0-9.+]+', '_', '-'.join(settings))}.{suffix}"


def measure(args, reference, model, row):
    """The dict of a row, read from its file if it was measured with the same weights and photographs."""
    path, both = path_of(args, row, "json"), f"{model.hash}-{reference.hash}"
    if path.is_file():
        found = json.loads(path.read_text())
        if found["hash"] == both:
            return found
    wall, cpu = time.time(), time.process_time()
    x = faces(model._replace(denoiser=common.watch(model.denoiser, args)), args.n, row, args.device)
    wall, cpu = time.time() - wall, time.process_time() - cpu
    numbers = reference.score(x, np.repeat(model.names, args.n), row.scale > 0)
    found = row._asdict() | dict(nfe=args.evaluations // len(x), seen=model.seen, seconds=wall,
                                 cpu_seconds=cpu, hash=both) | numbers
    picture = common.grid(x[:: args.n], len(model.names))
    common.save_uint8(picture, path_of(args, row, "png"), row.seed)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(unfinished, path)                             # never half a row
    return found


def measure_all(args):
    """The dicts of all rows of a table."""
    reference, found = Reference(args), []
    if args.table in ("solvers", "scales", "intervals", "choose"):
        model = load_model(args, args.ckpts[0] if args.ckpts else None, reference.real[1])
        rows = [Row("", s, n, scale, seed, *interval) for seed in args.seeds
                for s, n, scale, *interval in map(ROWS[args.table].get, args.only)]
        return [measure(args, reference, model, row) for row in tqdm(rows, "rows", disable=None)]
    for name in args.ckpts if args.table == "seen" else args.only:
        model = load_model(args, name if args.table == "seen" else trained(args, name), reference.real[1])
        found += [measure(args, reference, model, Row(name, "dpm++2m", 20, 1.0, seed)) for seed in args.seeds]
    return found


def trained(args, name):
    """The checkpoint of a row of CHANGES, which is trained first, or further, if need be."""
    change = ROWS["mattered"][name]
    # of "no EMA" it is the defaults'
    same = next(other for other, c in ROWS["mattered"].items() if c[:2] == change[:2])
    out = args.out / "trained" / str(args.iters) / re.sub(r"\W+", "_", same)
    path = out / "model.pt"
    if (not path.is_file()
            or common.read_checkpoint(path, cfg_afhq.TRAINED_BY, resume=True)["iter"] < args.iters):
        flags = ["--resume" if path.is_file() else "--train", "--data", args.data, "--iters", str(args.iters),
                 "--out", str(out), "--device", str(args.device), "--dtype", args.dtype, *change.flags]
        own = cfg_afhq.parse_args(flags + ["--compile"] * args.compile)
        training.train(common.prepare(own, cfg_afhq.TRAINED_BY), **change.batches)
        if args.compile:
            torch.compiler.reset()
    if change.ema:
        return path
    checkpoint = common.read_checkpoint(path, cfg_afhq.TRAINED_BY, resume=True)
    torch.save(checkpoint | {"ema": checkpoint["model"]}, out / "last.pt")
    return out / "last.pt"


def nearest(a, b, chunk=1000):
    """For each row of a (n, d) the distance to the nearest row of b (m, d), and that row's number."""
    a, best = a.float(), torch.full((len(a),), math.inf)
    number = torch.zeros(len(a), dtype=torch.long)
    for i in range(0, len(b), chunk):
        distance, j = torch.cdist(a, b[i:i + chunk].float()).min(1)
        best, number = torch.minimum(best, distance), torch.where(distance < best, i + j, number)
    return best, number


def copies(args):
    """Does it copy? Distances of samples, and of held-out photographs, to the nearest training photograph.

    As many held-out photographs are taken as there are samples, n of each class: means over 200 draws.
    """
    (train, _), (val, classes) = photographs(args, "train"), photographs(args, "val")
    model = load_model(args, args.ckpts[0] if args.ckpts else None, classes)
    extractor, n = fid.load_extractor(device=args.device), len(model.names) * args.n
    fewest = min(collections.Counter(classes).values())
    if fewest < args.n:
        common.stop(f"--n {args.n} is more than the {fewest} held-out photographs of a class.")
    draws = fid.floor_draws(np.arange(len(val)), classes, np.repeat(model.names, args.n), 200, args.seed)
    train_features = torch.from_numpy(fid.cached_features(train, extractor, args.out / "cache")[0])
    mirrored = torch.cat([train, train.flip(3)])                # a copy may be mirrored
    sets = {"held-out photographs": val}
    for scale in (1.0, 3.0):
        row = Row("", "dpm++2m", 20, scale, args.seed)
        sets[f"samples, scale {scale:g}"] = faces(model, args.n, row, args.device)
    print("| 5 % / median / 95 % (least) | rms of pixel levels, of 255 | in faces features |\n|-|-|-|")
    rows = []
    for name, x in sets.items():
        by_pixel, i = nearest(x.flatten(1), mirrored.flatten(1))
        by_feature, j = nearest(torch.from_numpy(fid.features(x, extractor)[0]), train_features)
        line = f"| {name} |"
        for kind, d in (("pixels", by_pixel.numpy() / math.sqrt(x[0].numel())),
                        ("features", by_feature.numpy())):
            parts = [d[k] for k in draws] if x is val else [d]
            low, mid, high, least = np.mean([[*np.percentile(d, (5, 50, 95)), d.min()] for d in parts], 0)
            line += f" {low:.1f} / {mid:.1f} / {high:.1f} ({least:.1f}) |"
            rows.append(dict(set=name, distance=kind, p5=low, median=mid, p95=high, least=least, n=n))
        print(line)
        if "scale 1" in name:
            some = torch.arange(0, n, max(1, n // 16))[:16]
            shown = torch.cat([x[some], train[j[some]], mirrored[i[some]]])
    picture = common.grid(shown, len(some))
    common.save_uint8(picture, args.out / "copies.png", args.seed)
    common.save_table(rows, args.out / "copies.csv")
    print(f"{args.out / 'copies.png'}: samples, nearest training photographs in features, nearest in pixels")


def by_settings(rows):
    """Lists of the rows that differ in the seed only."""
    groups = {}
    for row in rows:
        groups.setdefault(json.dumps([row[k] for k in Row._fields if k != "seed"]), []).append(row)
    return groups.values()


def write(args, rows):
    """OUT/TABLE.csv with every row; the mean and spread over seeds on the screen -> curves to plot."""
    common.save_table(rows, f"{args.output}.csv")
    first = rows[0]
    print(f"{first['n_fake']} pictures against {first['n_real']}, floor {first['floor']:.1f} +- "
          f"{first['floor_sd']:.1f}, seeds {' '.join(map(str, args.seeds))} of the samples: mean +- "
          + ("standard deviation" if len(args.seeds) > 1 else "the jackknife's standard error"))
    print("| what | NFE | FID | KID x 1000 | asked |\n|-|-|-|-|-|")
    curves = {}
    for same in by_settings(rows):
        name, solver, steps, scale, (lo, hi) = (same[0][k] for k in ("name", "solver", "steps", "scale",
                                                                     "interval"))
        mean = {k: np.mean([r[k] for r in same]) for k in ("fid", "kid")}
        sd = {k: np.std([r[k] for r in same], ddof=1) if len(same) > 1 else same[0][f"{k}_se"] for k in mean}
        asked = f"{np.mean([r['asked'] for r in same]):.1%}" if "asked" in same[0] else ""
        settings = f"{solver}-{steps}, scale {scale:g}, {lo:g} to {hi:g}"
        what = {"solvers": f"{solver}-{steps}", "scales": f"scale {scale:g}",
                "intervals": settings, "choose": settings}.get(args.table, name)
        print(f"| {what} | {same[0]['nfe']} | {mean['fid']:.1f} ± {sd['fid']:.1f} | "
              f"{1e3 * mean['kid']:.0f} ± {1e3 * sd['kid']:.0f} | {asked} |")
        x = {"solvers": same[0]["nfe"], "scales": scale, "seen": same[0]["seen"] / 1000}.get(args.table, what)
        line = solver if args.table == "solvers" else "DPM-Solver++(2M), 20 steps"
        curves.setdefault(line, []).append((x, mean["fid"], sd["fid"]))
    return curves


def plot(args, curves, floor):
    """FID against NFE, scale or pictures seen: a line for each solver, bars of one sd, and the floor."""
    figure, axes = common.new_figure()
    colours = common.BLUE, common.ORANGE, common.GREEN, common.PINK, common.INK, common.SKY
    for (name, points), colour in zip(curves.items(), colours):
        x, mean, sd = np.array(points).T
        axes.errorbar(x, mean, sd, fmt="o-", ms=4, capsize=3, color=colour, label=name)
    axes.axhline(floor, color="0.5", ls="--", lw=1)
    axes.annotate("floor: photographs", (1, floor), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                  textcoords="offset points", ha="right", color="0.4", fontsize=9)
    if args.table == "solvers":
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
        axes.set_yticks([], minor=True)
    label = {"solvers": "network evaluations", "scales": "guidance scale", "seen": "thousand pictures seen"}
    axes.set(xlabel=label[args.table], ylabel="FID (faces network of fid.py)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    common.save_figure(figure, f"{args.output}.png", args.seed)


def plot_names(args, points):
    """The FID of each row of mattered, intervals or choose, with a bar of one sd.

    The grey band is the span of the default trainings.
    """
    names, mean, sd = zip(*sorted(points, key=lambda point: -point[1]))
    figure, axes = common.new_figure(1, 1, 7, 0.3 * len(names) + 1)
    axes.errorbar(mean, names, xerr=sd, fmt="o", ms=5, capsize=3, color=common.BLUE)
    default = [m for name, m in zip(names, mean) if name.startswith("the defaults")]
    if default:
        axes.axvspan(min(default), max(default), color="0.9", zorder=0)
    after = f" after {args.iters * 32:,} pictures" if args.table == "mattered" else ""
    axes.set(xscale="log", xlabel=f"FID{after} (faces network of fid.py)")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, axis="x")
    common.save_figure(figure, f"{args.output}.png", args.seed)


def show_faces(args):
    """OUT/TABLE-faces.png: the first face of each class in every row, from the same noises."""
    if args.table == "solvers":
        rows = {s: [Row("", s, n, 1.0, args.seed) for n in (10, 20, 50)] for s in SOLVERS}
        titles = [f"{n} evaluations" for n in (10, 20, 50)]
    else:
        rows = {name: [Row(name, "dpm++2m", 20, 1.0, seed) for seed in args.seeds] for name in args.only}
        titles = [f"seed {seed}" for seed in args.seeds]
    size = 2.1 * len(titles), 0.66 * len(rows) + 0.15
    figure, axes = common.new_figure(len(rows), len(titles), *size, squeeze=False)
    for line, (name, row) in zip(axes, rows.items()):
        for axis, one in zip(line, row):
            axis.imshow(np.array(Image.open(path_of(args, one, "png"))), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(textwrap.fill(name, 15), fontsize=6.5, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=6.5)
    common.save_figure(figure, f"{args.output}-faces.png", args.seed)


def parse_args(argv=None):
    p = common.parser(__doc__, "results", "data", "device", "dtype", "compile")
    add = p.add_argument
    add("table", choices=["solvers", "scales", "intervals", "choose", "seen", "mattered", "copies"],
        help="which table")
    add("--ckpts", nargs="+", help="checkpoints (unset: the one in assets/); seen takes several")
    add("--n", type=common.checked(int, lambda n: 2 <= n <= 3333, "a whole number in 2..3333"), default=64,
        help="pictures of each class")
    add("--seeds", type=common.count, default=3,
        help="samples with the seeds --seed, --seed + 1, ...; picture i uses 10000 seed + i")
    add("--iters", type=common.count, default=2000, help="optimiser steps of each training for mattered")
    add("--only", nargs="+", metavar="ROW", help="these rows only (unset: all but ddpm 1000)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.data != "drawn" and not all((pathlib.Path(args.data) / s).is_dir() for s in ("train", "val")):
        common.stop(f"no {args.data}/train and val; `python common.py` downloads AFHQ, "
                    "or name another --data.")
    least, most = {"seen": (1, 99), "mattered": (0, 0)}.get(args.table, (0, 1))
    if not least <= len(args.ckpts or []) <= most:
        common.stop("seen takes --ckpts a.pt b.pt ..., mattered none, the others one at most.")
    known = ROWS.get(args.table, {})
    for name in args.only or []:
        if name not in known:
            common.stop(f"{args.table} has no row {name!r}; --only takes of {', '.join(known) or 'nothing'}.")
    args = common.prepare(args)
    args.output = args.out / (f"{args.table}-only" if args.only else args.table)
    args.only = args.only or [name for name in known if name != "ddpm 1000"]
    args.seeds = range(args.seed, args.seed + args.seeds)
    try:
        if args.table == "copies":
            return copies(args)
        rows = measure_all(args)
    except ValueError as error:
        common.stop(f"{error}.")
    curves = write(args, rows)
    if args.table in ("mattered", "intervals", "choose"):
        plot_names(args, *curves.values())
    else:
        plot(args, curves, rows[0]["floor"])
    if args.output.name in ("solvers", "mattered"):
        show_faces(args)
    print(f"{args.output}.png: {len(rows)} rows, {time.time() - args.began:.1f} s")


if __name__ == "__main__":
    common.run(main)
