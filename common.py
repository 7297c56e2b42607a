r"""What is no algorithm, once: data, pictures, point sets, distances, flags, checkpoints, training runs, figures.

No schedule, network, loss or sampler stands here. A script that goes into coursework needs itself and this file
(and fid.py, if it reports a FID).

Flags        parser makes the flags that scripts share and checks ranges; prepare turns them into a device, a folder and
             a checkpoint; stop ends a program with one sentence; run(main) does so for Ctrl-C and full disks too.
Training     Run is what surrounds the ten lines that learn: torchrun's processes, --resume, log.csv, loss.png, model.pt.
Photographs  load_images(root, split, size) reads AFHQ's layout root/{train,val}/CLASS/*.jpg|png: any number of classes
             (the sub-folders, sorted; labels 1..K, since 0 is the empty label), any resolution. One rule brings each
             picture to size x size, for training, evaluation and FID alike: the largest centred square, then one
             antialiased Lanczos resize. root = "drawn" draws faces from a seed; root = "fashion-mnist" is torchvision's.
Pictures     values are [-1, 1] as float and 0..255 as uint8. Picture i draws its noise from its own generator, seed + i.
Points       points(name, n): the 2-D sets of the courses, in the courses' own scaling.
Distances    chamfer (sum over points, squared), chamfer_mean (mean over small clouds, squared), emd; psnr, ssim, seam.
Figures      panels and animate draw points; report prints a table of mean and standard deviation over seeds.

Run
  python common.py                    AFHQ v1 into data/afhq, then data/afhq/eval as 64 x 64 PNG
  python common.py --data drawn       a picture of the drawn faces and one of the point sets
"""
import argparse
import concurrent.futures
import contextlib
import csv
import hashlib
import http.client
import inspect
import io
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from tqdm import tqdm

AFHQ = "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1"   # AFHQ v1 (StarGAN v2), CC BY-NC 4.0
FACES = pathlib.Path(__file__).parent / "assets" / "faces"         # made by cfg_afhq.py
SETS = ("swiss_roll", "moons", "circles", "scurve", "checkerboard", "gaussians", "normal")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
LOSSY = {"JPEG", "MPO", "WEBP"}                                 # PIL's names of formats that change pixels
SYSTEM = re.compile(r"[.@]|__MACOSX$")     # how names begin that are hidden, or that systems add to folders of pictures


def stop(message):
    """End the program with one sentence on stderr and exit code 2: the user can mend this.

    Of torchrun's processes the first speaks for all, until they work together and one of them may fail alone.
    """
    if os.environ.get("RANK", "0") == "0" or dist.is_initialized():
        print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def run(main):
    """main(), with one sentence instead of a traceback on Ctrl-C, and where the disk is full or can't be written."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")        # names of files may be no UTF-8
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{pathlib.Path(sys.argv[0]).name}: interrupted; files that were complete before are as they were.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        stop(f"{error}; make room, or name another file or folder.")


# ---------------------------------------------------------------- flags, device, checkpoint

def device(name="auto"):
    """torch.device for auto|cpu|cuda|mps; auto takes the fastest there is. Stops if it isn't there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in have if have[kind])
    if not have[name]:
        stop(f"this machine has no {name} device; omit --device, or say --device cpu.")
    return torch.device(name)


def bf16(dtype, device):
    """Whether to multiply in bfloat16: as told by fp32|bf16; on auto where the hardware does it natively."""
    if dtype != "auto":
        return dtype == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = pathlib.Path("/proc/cpuinfo")
    words = set(flags.read_text().split()) if device.type == "cpu" and flags.is_file() else set()
    return bool({"amx_bf16", "avx512_bf16"} & words)


class Parser(argparse.ArgumentParser):
    """argparse with one sentence for a wrong flag or an empty value, and a record of the flags that were typed."""

    def error(self, message):
        stop(f"{message}; --help lists the flags.")

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        args.typed = {a.dest for a in self._actions if words & set(a.option_strings)}
        args.choices = {a.dest: list(a.choices) for a in self._actions if a.choices}
        for flag in args.typed:
            value = getattr(args, flag, None)
            if "" in (value if isinstance(value, list) else [value]):
                self.error(f"argument --{flag.replace('_', '-')}: its value is empty")
        return args


def checked(kind, good, what):
    """A type for argparse: kind(text), refused with a sentence unless good(value)."""
    def convert(text):
        try:
            value = kind(text)
            if good(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return convert


def at_least(least):
    """A type for argparse: whole numbers from `least` on."""
    return checked(int, lambda v: v >= least, f"a whole number from {least} on")


def above(bound):
    """A type for argparse: finite numbers greater than a bound."""
    return checked(float, lambda v: bound < v < math.inf, f"a finite number above {bound}")


count = at_least(1)
natural = checked(int, lambda v: 0 <= v < 2 ** 62, "a whole number in 0..2^62")
finite = checked(float, math.isfinite, "a finite number")
positive = above(0)
share = checked(float, lambda v: 0 <= v <= 1, "a number in 0..1")
fraction = checked(float, lambda v: 0 < v <= 1, "a number in 0..1, 0 left out")
decay = checked(float, lambda v: 0 <= v < 1, "a number in 0..1, 1 left out")
bound = checked(float, lambda v: v >= 0, "a number from 0 on, or inf")
pull = checked(float, lambda v: 0 <= v <= 1000, "a number in 0..1000")

SHARED_FLAGS = {
    "data": dict(default="data/afhq", help="folder of photographs {train,val}/CLASS/*.jpg|png; or drawn, or fashion-mnist"),
    "ckpt": dict(help="checkpoint (unset: OUT/model.pt if there, else the one in assets/); with --train: the weights to start from"),
    "device": dict(default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto takes the fastest there is"),
    "dtype": dict(default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where the hardware multiplies it natively"),
    "compile": dict(action="store_true", help="torch.compile the network (needs a C++ compiler on a CPU)"),
    "size": dict(type=count, default=64, help="side of the pictures"),
    "set": dict(default="swiss_roll", choices=SETS, help="set of points"),
    "batch": dict(type=count, default=256, help="points for each optimiser step"),
    "lr": dict(type=positive, default=3e-3, help="peak learning rate"),
    "seeds": dict(type=count, default=1, help="number of trainings, with the seeds --seed, --seed + 1, ...: the table has mean and spread"),
    "gif": dict(action="store_true", help="also write samples.gif, from noise to pictures"),
    "train": dict(action="store_true", help="train first, then sample once"),
    "resume": dict(action="store_true", help="continue the training in OUT/model.pt, with its flags"),
    "save": dict(type=count, default=500, help="optimiser steps between checkpoints; each also writes samples_STEP.png"),
    "skip-bad": dict(action="store_true", help="leave out pictures that can't be read instead of stopping"),
}


def parser(doc, script, *flags):
    """An ArgumentParser with --out, --seed and the named SHARED_FLAGS; doc is the script's docstring."""
    p = Parser(description=doc.split("\n")[0], allow_abbrev=False,
               formatter_class=lambda prog: argparse.ArgumentDefaultsHelpFormatter(prog, max_help_position=26, width=110))
    p.set_defaults(script=script)
    p.add_argument("--out", default=f"out/{script}", help="folder for everything that is written")
    p.add_argument("--seed", type=natural, default=0, help="seed of all chance; picture i uses seed + i" if "ckpt" in flags else "seed of all chance")
    for flag in flags:
        options = dict(SHARED_FLAGS[flag])
        if flag == "ckpt" and "train" not in flags:
            options["help"] = options["help"].split(";")[0]
        p.add_argument(f"--{flag}", **options)
    return p


def add_network_flags(p, Network):
    """A flag for each keyword of Network that has a default; its help is the line `name: help` of the class's docstring."""
    p.set_defaults(Network=Network)
    for name, keyword in inspect.signature(Network).parameters.items():
        found = re.search(rf"^ *{name}: (.+)$", Network.__doc__ or "", re.M)
        if keyword.default is not keyword.empty:
            several = isinstance(keyword.default, tuple)
            kind = type(keyword.default[0] if several else keyword.default)
            p.add_argument(f"--{name}", type={int: count, float: decay}.get(kind, kind), default=keyword.default,
                           help=found[1] if found else f"{name} of {Network.__name__}", **({"nargs": "*"} if several else {}))


def labels(names, label=None):
    """{class name: label in 1..K} of all classes or, where label isn't None, of the one with that name, else that number. Stops."""
    numbers = {name: k for k, name in enumerate(names, 1)}
    if label is None:
        return numbers
    k = ({str(k): k for k in numbers.values()} | numbers).get(label)             # a name wins over a number
    if k is None:
        stop(f"there is no class {label!r}; --label is one of {', '.join(names)}, or its number in 1..{len(names)}.")
    return {names[k - 1]: k}


def refuse(args, flag, ignored):
    """Stops where a flag was typed that the value of another leaves without meaning. ignored: {value: names of flags}."""
    for name in ignored.get(getattr(args, flag), "").split():
        if name in args.typed:
            stop(f"--{name} has no meaning with --{flag} {getattr(args, flag)}; leave it out.")


def network_keywords(Network, args, images, names=()):
    """The keywords of Network for pictures (N, C, size, size) of the named classes: size, channels and the number of classes
    from these, the others from the flags."""
    own = {"size": images.shape[-1], "channels": images.shape[1], "classes": len(names) or None}
    values = {name: own.get(name, getattr(args, name, None)) for name in inspect.signature(Network).parameters}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def prepare(args, trained_by=()):
    """Flags as typed -> ready to use: args.out a folder that can be written, args.device a torch.device, args.bf16.

    trained_by: the scripts whose checkpoints this one reads, the one that trains by default first. Then args.checkpoint
    is the checkpoint to sample from, to resume or to start from (None when training starts from nothing), args.net its
    network's keywords (or None), and the flags that it was trained with replace those that were not typed.
    """
    args.out, args.began = pathlib.Path(args.out), time.time()
    if hasattr(args, "interval") and args.interval[0] > args.interval[1]:
        stop(f"--interval {args.interval[0]:g} {args.interval[1]:g} holds no level; give the lower bound first.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        stop(f"--out {args.out} is no folder that can be written ({error}); choose another.")
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))   # torchrun's
    if hasattr(args, "device"):
        args.device = device(args.device)
        if args.world > 1 and args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
    if hasattr(args, "dtype"):
        args.bf16 = bf16(args.dtype, args.device)
    compilers = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++", "cl"))
    if getattr(args, "compile", False) and args.device.type == "cpu" and not any(map(shutil.which, compilers)):
        print("(no C++ compiler here, so --compile is left out)", file=sys.stderr)
        args.compile = False
    if getattr(args, "data", None) == "fashion-mnist":
        if "size" in args.typed and args.size != 32:
            stop(f"--size {args.size} can't be had: fashion-mnist is 32 x 32; leave the flag out.")
        args.size = 32
    if trained_by:
        _prepare_checkpoint(args, trained_by)
        if "steps" not in args.typed:
            args.steps = min(args.steps, args.T)
        if args.steps > args.T:
            stop(f"--steps {args.steps} must lie in 1..{args.T}, the number of noise levels.")
    if args.world > 1:
        if not getattr(args, "train", False):
            stop("torchrun is for --train and --resume; everything else takes one process.")
        if args.batch % args.world:
            stop(f"--batch {args.batch} can't be shared by {args.world} processes; take a multiple.")
    return args


def _prepare_checkpoint(args, trained_by):
    """args.checkpoint, args.net, args.names and the flags that a checkpoint settles: see prepare."""
    saved, shipped = args.out / "model.pt", pathlib.Path(__file__).parent / "assets" / f"{trained_by[0]}.pt"
    resume, training = getattr(args, "resume", False), getattr(args, "train", False)
    if resume and args.ckpt:
        stop(f"--resume continues {saved}, so --ckpt {args.ckpt} has no place; --train --ckpt starts from weights.")
    if training and not resume and saved.is_file():
        stop(f"{saved} holds a training already; continue it with --resume, or train into another --out.")
    args.train = training or resume
    path = saved if resume else args.ckpt or (None if training else saved if saved.is_file() else shipped)
    args.checkpoint = read_checkpoint(path, trained_by, resume) if path else None
    args.net = args.checkpoint["net"] if path else None
    args.names = args.checkpoint["names"] if path else None
    if not path:
        pictures = torch.empty(1, 1 if args.data == "fashion-mnist" else 3, args.size, args.size, device="meta")
        keywords = network_keywords(args.Network, args, pictures)
        with contextlib.suppress(Exception), without_values():            # its own checks, before any data is read
            args.Network(**{name: 1 if value is None else value for name, value in keywords.items()})
        return
    args.ckpt, flags = path, args.checkpoint.get("flags", {}) if resume else {}
    settled = {"T": 1000} | args.net | args.checkpoint["method"]
    for name, value in settled.items():
        if name in args.typed and getattr(args, name) != value:
            stop(f"--{name} {getattr(args, name)} can't be had: {path} was trained with --{name} {value}; leave the flag out.")
        if value not in args.choices.get(name, [value]):
            stop(f"{path} was trained with --{name} {value}, which is none of {', '.join(args.choices[name])}; give another checkpoint.")
    if not all(isinstance(v, type(getattr(args, k))) for k, v in flags.items()):
        stop(f"{path} holds flags that --train doesn't write; train into another --out.")
    vars(args).update({k: v for k, v in flags.items() if k not in args.typed}, **settled)
    if hasattr(args, "Network"):
        _check_network(args)
    if resume and args.iters < args.checkpoint["iter"]:
        stop(f"{path} has {args.checkpoint['iter']} iterations already, more than --iters {args.iters}; raise --iters, or sample without --resume.")


@contextlib.contextmanager
def without_values():
    """Layers that are built here have names and shapes but no memory. nn.Embedding's normal_ would import torch's compiler: 1.7 s."""
    normal, nn.init.normal_ = nn.init.normal_, lambda tensor, *_, **__: tensor
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.init.normal_ = normal


def _check_network(args):
    """Stops unless Network can be built from args.net and its tensors have the names and shapes of the checkpoint's."""
    try:
        inspect.signature(args.Network).bind(**args.net)
        with without_values():
            want = {name: w.shape for name, w in args.Network(**args.net).state_dict().items()}
    except (NotImplementedError, RuntimeError):        # a network of the user's that can't be built without memory
        return
    except (TypeError, ValueError, LookupError) as error:
        stop(f"{args.ckpt} holds another network than {args.Network.__name__} ({error}); give another checkpoint.")
    if any(want != {name: w.shape for name, w in args.checkpoint[key].items()} for key in ("ema", "model") if key in args.checkpoint):
        stop(f"the tensors in {args.ckpt} don't fit its own network; give another checkpoint.")


METHOD = "schedule", "predict", "weight", "T"                           # what sampling must know of a training
REMEMBERED = "iters", "save", "batch", "lr", "ema", "loss", "seed", "drop"      # the other flags that --resume restores


def read_checkpoint(path, trained_by, resume=False):
    """A checkpoint's dict; stops when there is none, or it is cut short, foreign, another script's or not finite."""
    way_out = "train into another --out" if resume else "give another with --ckpt"
    if not pathlib.Path(path).is_file():
        stop(f"no checkpoint {path} to resume; start it with --train." if resume else
             f"no checkpoint {path}; copy the folder assets/ beside the script, name another with --ckpt, or make one with "
             f"`python {trained_by[0]}.py --train --data drawn`.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        by = checkpoint["script"]
    except Exception:   # torch raises half a dozen kinds on foreign files
        stop(f"{path} is no checkpoint of these scripts, or is cut short; {way_out}.")
    if by not in trained_by:
        stop(f"{path} was made by {by}.py; take it there, or give one of {', '.join(trained_by)}.")
    if resume and not {"model", "opt", "log"} <= checkpoint.keys():
        stop(f"{path} holds weights without the state of their training; start from them with --train --ckpt {path} and another --out.")
    if not _is_whole(checkpoint):
        stop(f"{path} lacks something, or holds what these scripts don't write; {way_out}.")
    if not all(w.isfinite().all() for key in ("ema", "model") for w in checkpoint.get(key, {}).values()):
        stop(f"{path} holds weights that are not finite; {way_out}, or train again with a lower --lr.")
    return checkpoint


def _is_whole(checkpoint):
    """Whether a checkpoint holds what Run writes, each of its kind, and names that are safe as names of folders."""
    shipped = {"net": dict, "method": dict, "names": list, "iter": int, "ema": dict}
    kinds = shipped | {"flags": dict, "log": list, "model": dict, "opt": dict}       # all that a training writes
    return (shipped.keys() <= checkpoint.keys()
            and all(isinstance(checkpoint[k], kinds[k]) for k in kinds.keys() & checkpoint.keys())
            and {"size", "channels"} <= checkpoint["net"].keys()
            and set(METHOD[:3]) <= checkpoint["method"].keys() <= set(METHOD)
            and checkpoint.get("flags", {}).keys() <= set(REMEMBERED)
            and isinstance(checkpoint["method"].get("T", 1), int) and checkpoint["method"].get("T", 1) >= 1
            and all(isinstance(w, torch.Tensor) for key in ("ema", "model") for w in checkpoint.get(key, {}).values())
            and all(isinstance(n, str) and n not in ("", ".", "..") and not set(n) & set("/\\") for n in checkpoint["names"]))


def load_weights(network, state, path):
    """network.load_state_dict, with a sentence where the tensors don't fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError:
        stop(f"the tensors in {path} don't fit its own network; give another checkpoint.")


def load(network, args):
    """The averaged weights of args.checkpoint in the network, on the device, frozen, compiled if asked."""
    load_weights(network, args.checkpoint["ema"], args.ckpt)          # shipped in fp16, here in fp32
    network = network.eval().requires_grad_(False).to(args.device, memory_format=torch.channels_last)
    if args.bf16:                                            # once, where autocast would do it in every call
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.bfloat16()
    return torch.compile(network) if args.compile else network


# ---------------------------------------------------------------- training

def parallel(network, args):
    """The network as training calls it: compiled if asked, and under torchrun one of several that average their gradients."""
    network = torch.compile(network) if args.compile else network
    if args.world == 1:
        return network
    dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    return nn.parallel.DistributedDataParallel(network)


class Muon(torch.optim.Optimizer):
    """Muon for weights with two dimensions or more, Adam for the others (Jordan et al. 2024; Liu et al. 2025, 2502.16982).

    The momentum of a weight is taken as a matrix U S V^T, a row for each output, and the step goes along U V^T: as far
    where the momentum is small as where it is large. Newton and Schulz' iteration takes X, of norm 1, to a X + b X X^T X
    + c X X^T X X^T X, and so each singular value s to a s + b s^3 + c s^5. Five times bring those above 0.0015 to
    0.7 ... 1.2; bfloat16 is exact enough for this. The entries of U V^T have the rms 1 / sqrt(longer side), Adam's steps
    an rms of about 0.2; their ratio lets one lr serve both. Only matrices decay.
    """

    def __init__(self, parameters, bf16=False, lr=1e-3, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.01):
        super().__init__(parameters, dict(bf16=bf16, lr=lr, momentum=momentum, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self.adam if p.ndim < 2 else self.muon)(p, p.grad, self.state[p], **group)

    def muon(self, p, grad, state, bf16, lr, momentum, weight_decay, **_):
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].mul_(momentum).add_(grad)
        x = grad.add(state["m"], alpha=momentum).flatten(1)                     # Nesterov's
        wide = x.shape[0] <= x.shape[1]
        x = (x if wide else x.T) / (x.norm() + 1e-7)
        x = x.bfloat16() if bf16 else x
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
        step = (x if wide else x.T).reshape(p.shape).to(p)
        p.mul_(1 - lr * weight_decay).add_(step, alpha=-lr * 0.2 * max(p.shape[0], p[0].numel()) ** 0.5)

    def adam(self, p, grad, state, lr, betas, **_):
        if not state:
            state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
        state["step"] += 1
        state["m"].lerp_(grad, 1 - betas[0])
        state["v"].lerp_(grad ** 2, 1 - betas[1])
        m, v = (state[k] / (1 - b ** state["step"]) for k, b in zip("mv", betas, strict=True))
        p.addcdiv_(m, v.sqrt() + 1e-8, value=-lr)


class Run:
    """What surrounds the steps of a training: `for it in run: ...; run.step(it, L)`.

    Iterating counts from the iteration after the checkpoint's to --iters. It seeds torch with a function of --seed, the
    iteration and the process, so a run that was stopped and resumed equals one that never stopped, to the bit on a CPU.
    step keeps log.csv, loss.png, model.pt and samples_STEP.png in --out, and stops at a loss or a weight that isn't finite.
    args.checkpoint, if there is one, is what training continues from (--resume) or starts from (--ckpt).
    """

    def __init__(self, args, names, network, ema, optimizer):
        self.args, self.state, self.log, self.first = args, (network, ema, optimizer), [], 1
        self.recent, self.clock, self.parent = [], time.time(), os.getppid()
        self.fixed = dict(script=args.script, net=args.net, names=names,
                          method={k: getattr(args, k) for k in METHOD}, flags={k: getattr(args, k) for k in REMEMBERED if hasattr(args, k)})
        if args.checkpoint and names != args.names and (args.resume or "classes" in args.net):
            stop(f"{args.ckpt} was trained on {', '.join(args.names)}, {args.data} holds {', '.join(names)}; give the same "
                 "--data, or train into another --out.")
        args.names = names
        labels(names, getattr(args, "label", None))         # a class that isn't there is told before the training, not after
        if args.resume:
            load_weights(network, args.checkpoint["model"], args.ckpt)
            try:
                optimizer.load_state_dict(args.checkpoint["opt"])
            except (ValueError, LookupError, TypeError, RuntimeError):
                stop(f"the optimiser's state in {args.ckpt} doesn't fit its network; start from its weights with --train --ckpt.")
            self.log, self.first = args.checkpoint["log"], args.checkpoint["iter"] + 1
            self.write_log()
        elif args.checkpoint:
            load_weights(network, args.checkpoint["ema"], args.ckpt)
        if args.checkpoint:
            load_weights(ema, args.checkpoint["ema"], args.ckpt)

    def __iter__(self):
        args = self.args
        self.bar = tqdm(range(self.first, args.iters + 1), "train", args.iters, initial=self.first - 1, disable=args.rank > 0 or None)
        for it in self.bar:
            torch.manual_seed(int(np.random.SeedSequence([args.seed, it, args.rank]).generate_state(1)[0]))
            yield it
        args.began = time.time()
        if args.world > 1:
            dist.destroy_process_group()
            if args.rank:                       # one process samples
                raise SystemExit(0)

    def step(self, it, L, preview=None):
        """Record the loss L of iteration it; every 50 look at it, every --save write. preview(noise) -> pictures."""
        args, (network, ema, optimizer) = self.args, self.state
        self.recent.append(L.detach())
        at_save = it % args.save == 0 or it == args.iters
        if it % 50 and not at_save:
            return
        losses, seconds = torch.stack(self.recent), time.time() - self.clock
        self.recent, self.clock = [], time.time()
        path = args.out / "model.pt"
        way_out = (f"{path} keeps the last good state: --resume it with a lower --lr" if path.is_file() else "train again with a lower --lr")
        if not losses.isfinite().all():
            bad = it - len(losses) + 1 + int((~losses.isfinite()).nonzero()[0])
            stop(f"the loss at iteration {bad} is not finite; {way_out}.")
        if not all(p.isfinite().all() for p in [*network.parameters(), *ema.parameters()]):
            stop(f"the weights after iteration {it} are not finite; {way_out}.")
        if os.getppid() != self.parent and args.world > 1:
            stop(f"torchrun has ended, so this process ends too; {path} keeps the last saved state.")
        self.log.append([it, losses.mean().item(), len(losses) * args.batch / seconds])
        self.bar.set_postfix(loss=f"{self.log[-1][1]:.4f}", images_per_s=f"{self.log[-1][2]:.0f}")
        if args.rank == 0 and at_save:
            state = dict(self.fixed, iter=it, log=self.log, model=network.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict())
            try:
                torch.save(state, f"{path}.tmp")                          # never a half-written checkpoint
            except RuntimeError as error:                                 # so torch calls a full disk
                raise OSError(f"{path}.tmp can't be written ({str(error).splitlines()[0]})") from None
            os.replace(f"{path}.tmp", path)
            self.write_log()
            if preview:
                noise = next(noise_batches(8, args, quiet=True))
                save_grid(preview(noise), args.out / f"samples_{it:06d}.png", 8, args.seed)

    def write_log(self):
        """OUT/log.csv and OUT/loss.png: iteration, mean loss since the last row, pictures per second."""
        if self.args.rank:
            return
        with open(self.args.out / "log.csv", "w", newline="") as file:
            csv.writer(file).writerows([["iteration", "loss", "images_per_s"], *self.log])
        figure, axes = new_figure(1, 1, 6, 3.5)
        axes.plot([r[0] for r in self.log], [r[1] for r in self.log], lw=1, color=BLUE)
        axes.set(xlabel="iteration", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
        save_figure(figure, self.args.out / "loss.png", self.args.seed)


def save_forward(x, diffuse, args):
    """OUT/forward.png: up to four of the pictures x (uint8, or float in [-1, 1]), each at eleven levels from 0 to T.

    diffuse(x0, t, eps) -> x_t, for a whole number t.
    """
    if args.rank:
        return
    x0 = x[torch.linspace(0, len(x) - 1, min(4, len(x))).long()].cpu()
    x0 = x0 if x0.is_floating_point() else to_float(x0)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(args.seed))
    rows = torch.stack([diffuse(x0, t, eps) for t in even(args.T, 10)[::-1]], 1)
    save_grid(rows.flatten(0, 1), args.out / "forward.png", rows.shape[1], args.seed)


# ---------------------------------------------------------------- sampling

def even(start, steps):
    """Whole levels from start down to 0 in `steps` even steps ("trailing": Lin et al. 2023, arXiv 2305.08891); no more than start."""
    steps = min(steps, start)
    return [round(start * (1 - i / steps)) for i in range(steps + 1)]


def noise_batches(n, args, size=64, quiet=False, first=0):
    """For n pictures, up to `size` at a time: callables that return N(0, I) noise, picture i from its own generator.

    The seed of picture i is --seed + first + i.
    """
    shape = args.net["channels"], args.net["size"], args.net["size"]
    for args.batches, i in enumerate(tqdm(range(0, n, size), "batches", leave=False, disable=quiet or None), 1):
        yield image_noise(shape, args.seed + first + i, min(size, n - i), args.device)


def rows_of(args):
    """(folder inside png, label, scale) of each row of samples: at each --scale all classes, or --label; at 0 one without label.

    It collects the evaluations per picture of each scale in args.nfe, for save_samples.
    """
    args.nfe, wanted = {}, labels(args.names, args.label)
    for scale in args.scale:
        for name, label in (wanted if scale else {"unlabelled": 0}).items():
            before = args.evaluations
            yield f"scale{scale:g}/{name}" if len(args.scale) > 1 else name, label, scale
            args.nfe[scale] = (args.evaluations - before) / args.n


def watch(denoiser, args, most=48):
    """The denoiser, which also counts evaluations per picture, for save_samples to print, and keeps frames for --gif.

    A frame is the first 16 pictures of x_t as uint8. When there are twice `most`, every second one goes.
    """
    args.evaluations, args.frames, stride = 0, [], 1

    def watched(xt, *rest):
        nonlocal stride
        if getattr(args, "gif", False) and args.batches == 1 and watched.calls % stride == 0:
            args.frames.append(to_uint8(xt[:16]).cpu())
            if len(args.frames) == 2 * most:
                args.frames, stride = args.frames[::2], 2 * stride
        watched.calls += 1
        args.evaluations += len(xt)
        return denoiser(xt, *rest)
    watched.calls = 0
    return watched


def slerp(x, z, n):
    """n points from x to z (B, C, H, W) on the great circle, where Gaussian noise keeps its length: (B n, C, H, W)."""
    angle = torch.acos(nn.functional.cosine_similarity(x.flatten(1), z.flatten(1)))[:, None, None, None, None]
    share = torch.linspace(0, 1, n, device=x.device)[:, None, None, None]
    way = torch.sin((1 - share) * angle) * x[:, None] + torch.sin(share * angle) * z[:, None]
    return (way / torch.sin(angle)).flatten(0, 1)


def save_samples(groups, args, original=None, rows=None):
    """OUT/png, OUT/samples.png and, with --gif, OUT/samples.gif; then the last line that a script prints.

    groups: {folder inside png, "" for none: pictures (N, C, H, W) in [-1, 1]}. The grid shows the first 64, or a row of
    each group where there are several, after the original if there is one. rows, for save_rows, stand in place of the
    grid; theirs called "original" go to OUT/original. The pictures of the last run make way only when the new ones are
    complete. The last line has the evaluations per picture: those that `watch` counted, or of each scale, by `rows_of`.
    """
    folders = {f"png/{name}": x for name, x in groups.items()} | ({"original": rows["original"]} if rows else {})
    new, tops = args.out / "png.new", ["png", "original"][:1 + bool(rows)]
    remove_pictures(new)
    for folder, x in folders.items():
        save_png(x, new / folder, seed=args.seed)
    for top in tops:
        replace_pictures(args.out / top, new / top)
    remove_pictures(new)
    x = torch.cat(list(groups.values()))
    if rows:
        save_rows(rows, args.out / "samples.png", args.seed)
    elif len(groups) > 1:
        shown = torch.cat([group[:16] for group in groups.values()])
        save_grid(shown, args.out / "samples.png", min(16, max(map(len, groups.values()))), args.seed)
    else:
        shown = x[:64] if original is None else torch.cat([original.cpu(), x[:64]])
        save_grid(shown, args.out / "samples.png", 8, args.seed)
    if args.frames:
        save_gif([*args.frames, to_uint8(x[:16]).cpu()], args.out / "samples.gif", min(8, len(x)))
    nfe = " ".join(f"{n:g}" for n in getattr(args, "nfe", {}).values() or [args.evaluations / len(x)])
    print(f"{args.out / 'samples.png'}: {len(x)} pictures, {args.steps} steps, NFE {nfe}, {time.time() - args.began:.1f} s")


def replace_pictures(folder, new):
    """Move the pictures of the folder `new` into another, whose pictures of an earlier run go."""
    remove_pictures(folder)
    for path in sorted(new.rglob("*.png")):
        target = folder / path.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    remove_pictures(new)


def made_here(path):
    """Whether a script of ours wrote this picture: a name of six digits, and a PNG that carries a command and a seed."""
    if not re.fullmatch(r"\d{6}\.png", path.name) or not path.is_file():
        return False
    try:
        with Image.open(path) as file:
            return {"command", "seed"} <= file.info.keys()
    except Exception:   # cut short by a full disk: such a name is ours
        return True


def remove_pictures(folder):
    """Remove the pictures of an earlier run from a folder, or fid.py would measure them too; and nothing else.

    Folders that are left empty go too.
    """
    folder = pathlib.Path(folder)
    for path in sorted(folder.rglob("*.png")) if folder.is_dir() else []:
        if made_here(path):
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True) if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
    elif folder.is_dir() and any(folder.iterdir()):
        print(f"({folder} holds files that are not these scripts' samples; they stay)", file=sys.stderr)


def autocast(device, bf16):
    """The context in which a network runs: products in bfloat16, or nothing at all."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, but faster in bfloat16 on a CPU (channels_last): in float32 where torch 2.15 is slow in bfloat16.

    That is where groups have fewer than 16 channels: the forward pass below 32 x 32 pixels (8 pictures of 64 channels,
    16 x 16: 0.83 ms, in float32 with two casts 0.13; AVX512), and the backward pass at every size (32 pictures of 32
    channels, 32 x 32, both passes: 7.0 and 2.0 ms), until at 2^23 values the copy in float32 costs what it saves. The
    output has the same bits (seen for groups of 4, 6, 8 and 12 channels), the gradient differs by rounding.
    """

    def forward(self, x):
        narrow = self.num_channels // self.num_groups < 16
        small = x.shape[2:].numel() < 1024 or x.requires_grad and x.numel() < 2 ** 23
        slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and narrow and small
        return super().forward(x.float()).to(x.dtype) if slow else super().forward(x)


# ---------------------------------------------------------------- photographs

def picture_files(folder):
    """Sorted paths of all pictures under a folder, but not of hidden files, nor in folders that systems add."""
    folder = pathlib.Path(folder)
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()
                  and not any(SYSTEM.match(part) for part in p.relative_to(folder).parts))


def read_rgb(path):
    """A picture file -> PIL picture in RGB, upright, that remembers its file's format.

    Grey of 16 bits is divided by 257 (65535 becomes 255), floats in 0..1 are multiplied by 255. Raises OSError (or a
    subclass) when the file is missing, no regular file, no picture or cut short; ValueError at other values.
    """
    if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():
        raise OSError("it is not a regular file")                 # to open a named pipe would wait for ever
    with Image.open(path) as file:
        kind, picture = file.format, ImageOps.exif_transpose(file)
    if picture.mode[0] in "IF":                                   # PIL's own conversion clips these to 0..255
        values, top = np.asarray(picture), 65535 if picture.mode[0] == "I" else 1
        if not ((values >= 0) & (values <= top)).all():
            raise ValueError(f"its values are not in 0..{top}")
        picture = Image.fromarray((values * (255.0 / top)).round().astype(np.uint8))
    picture = picture.convert("RGB")
    picture.format = kind
    return picture


def read_image(path, size):
    """A picture file -> uint8 (3, size, size): upright, largest centred square, one Lanczos resize. Raises as read_rgb."""
    picture = read_rgb(path)
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    picture = picture.resize((size, size), Image.LANCZOS, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def read_pictures(folder):
    """All pictures under a folder as they are, sorted -> x uint8 (N, 3, H, W), their N paths inside it, their formats.

    Raises ValueError: no picture, one that can't be read, sizes that differ.
    """
    folder = pathlib.Path(folder)
    paths = picture_files(folder)
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))}); name another folder")

    def read(path):
        try:
            picture = read_rgb(path)
        except Exception as error:   # PIL raises half a dozen kinds on broken files
            raise ValueError(f"{path} can't be read ({error}); remove it") from None
        return picture.size, picture.format, torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(read, paths), folder.name, len(paths), leave=False, disable=None))
    sizes, formats, x = zip(*found, strict=True)
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise ValueError(f"sizes differ: {paths[0]} is {sizes[0][0]} x {sizes[0][1]}, {path} is {size[0]} x {size[1]}; "
                             "bring all to one size by one rule first")
    return torch.stack(x), [path.relative_to(folder) for path in paths], set(formats)


def read_folder(folder, split="val"):
    """All pictures under a folder -> x uint8 (N, 3, H, W), the names of their N classes, the set of file formats.

    The class is the name of the top folder, "" where there is none. Of a folder {train,val}/CLASS, and of "drawn", it is
    that split as training sees it, at 64 px. Raises ValueError as read_pictures.
    """
    if folder == "drawn" or all((pathlib.Path(folder) / name).is_dir() for name in ("train", "val")):
        x, y, names = load_images(folder, split, 64)
        return x, [names[k - 1] for k in y], {f"{split} pictures made 64 px"}
    x, paths, formats = read_pictures(folder)
    return x, [path.parts[0] if path.parts[1:] else "" for path in paths], formats


def read_folders(folders, force=False):
    """{name: (folder, split)} of pictures to be compared -> {name: (x, classes)} as read_folder; prints a line for each.

    A folder that is None is left out. Raises ValueError where sizes differ or, unless force, where files with and without loss (JPEG, PNG) are compared.
    """
    sets, formats = {}, {}
    for name, (folder, split) in folders.items():
        if folder is None:
            continue
        x, classes, formats[name] = read_folder(folder, split)
        sets[name] = x, classes
        print(f"{name:7} {folder}: {len(x)} {'/'.join(sorted(formats[name]))}, {x.shape[3]} x {x.shape[2]}")
    sizes = {name: f"{x.shape[3]} x {x.shape[2]}" for name, (x, _) in sets.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"sizes differ ({', '.join(f'{n} {s}' for n, s in sizes.items())}); bring all to one size by one rule first")
    kinds = set().union(*formats.values())
    if kinds & LOSSY and kinds - LOSSY and not force:
        which = ", ".join(f"{n} {'/'.join(sorted(kind))}" for n, kind in formats.items())
        raise ValueError(f"lossy and lossless files together ({which}): part of the distance would be JPEG's; save all as PNG "
                         "from the originals, or say --force")
    return sets


def cached_array(path, compute):
    """compute() -> a finite array (N, d), kept in path (.npy): read from there the next time, if it is whole."""
    path = pathlib.Path(path)
    try:
        kept = np.load(path)
        if kept.ndim == 2 and np.isfinite(kept).all():
            return kept
    except Exception:   # none yet, cut short, or no array: computed again
        pass
    array = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            np.save(file, array)
        os.replace(f"{path}.tmp", path)                           # never half a file
    except OSError as error:
        print(f"(no cache written: {error})", file=sys.stderr)
    return array


def open_image(path, size):
    """read_image for a file that the user named: stops with a sentence where that raises."""
    try:
        return read_image(path, size)
    except Exception as error:   # PIL raises half a dozen kinds on broken files
        stop(f"{path} can't be read as a picture ({error}); give a JPEG or PNG file.")


def load_images(root, split="train", size=64, skip_bad=False):
    """All pictures of root/split/CLASS -> x uint8 (N, 3, size, size), y (N,) in 1..K, the K class names.

    root may also be "drawn" (three classes) or "fashion-mnist" (ten classes, one channel). Stops, with
    a way out, when there is no data, a class is empty, or a picture can't be read (unless skip_bad).
    """
    if root == "drawn":
        n, seed = (3000, 0) if split == "train" else (600, 1)
        return drawn_faces(n, size, seed)
    if root == "fashion-mnist":
        return fashion_mnist(split)
    folder = pathlib.Path(root) / split
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not SYSTEM.match(p.name)) if folder.is_dir() else []
    if not names:
        other = folder.parent / ("train" if split == "val" else "val")
        stop(f"no class folders in {folder}, although {other} is there; put pictures of each class into {folder}/CLASS." if other.is_dir() else
             f"no class folders in {folder}; `python common.py` downloads AFHQ, --data drawn needs no files.")
    files = {c: picture_files(folder / c) for c in names}
    for c in names:
        if not files[c]:
            stop(f"class folder {folder / c} holds no picture ({', '.join(sorted(SUFFIXES))}); "
                 "fill or remove it.")
    paths = [p for c in names for p in files[c]]
    stats = [(p, p.stat() if p.exists() else p.lstat()) for p in paths]        # lstat: of a link that leads nowhere
    stats = [(str(p.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for p, stat in stats]
    key = hashlib.sha256(repr(("centre square, lanczos", size, skip_bad, stats)).encode()).hexdigest()
    cache = pathlib.Path(root) / f".{split}-{size}.pt"
    if cache.is_file():
        try:
            kept = torch.load(cache, weights_only=True)
            if kept["key"] == key:
                return kept["x"], kept["y"], names
        except Exception:   # a cache that can't be read is only a slow start
            pass

    def read(path):
        try:
            return read_image(path, size)
        except Exception as error:   # PIL raises half a dozen kinds on broken files
            return f"{path} can't be read ({error})"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:   # PIL lets go of the lock
        x = list(tqdm(pool.map(read, paths), "pictures", len(paths), leave=False, disable=None))
    bad = [r for r in x if isinstance(r, str)]
    if bad and not skip_bad:
        stop(f"{bad[0]}; remove it ({len(bad)} such), or say --skip-bad to go on without.")
    y = torch.tensor([names.index(c) + 1 for c in names for _ in files[c]])
    good = [i for i, r in enumerate(x) if not isinstance(r, str)]
    for k, c in enumerate(names, 1):
        if k not in y[good]:
            stop(f"class folder {folder / c} holds no picture that can be read; fill or remove it.")
    x, y = torch.stack([x[i] for i in good]), y[good]
    try:
        for old in cache.parent.glob(f"{cache.name}.tmp*"):                     # of a program that was killed
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
        torch.save({"key": key, "x": x, "y": y}, f"{cache}.tmp{os.getpid()}")
        os.replace(f"{cache}.tmp{os.getpid()}", cache)
    except (OSError, RuntimeError) as error:
        print(f"(no cache written: {str(error).splitlines()[0]})", file=sys.stderr)
    return x, y, names


def batches(x, y, batch, even=True, mirror=True):
    """Endless (x0 float (batch, C, H, W) in [-1, 1], y (batch,)), on x's device.

    Each draw takes a class at random, then one of its pictures, then flips it or not: classes come
    evenly however many pictures each has. even=False takes pictures as they come, mirror=False flips none.
    All chance is torch's global CPU generator, so that its state is all a resumed run needs.
    """
    y = y.cpu()
    order = torch.argsort(y, stable=True)
    count = torch.bincount(y)[1:]                             # (K,) pictures of each class
    first = count.cumsum(0) - count
    while True:
        k = torch.randint(len(count), (batch,))
        i = order[first[k] + (torch.rand(batch) * count[k]).long().clamp(max=count[k] - 1)]
        i = i if even else torch.randint(len(y), (batch,))
        flip = (torch.rand(batch) < 0.5 * mirror)[:, None, None, None].to(x.device)
        x0 = x[i.to(x.device)]
        yield to_float(torch.where(flip, x0.flip(3), x0)), y[i].to(x.device)


def to_float(x):
    """uint8 (..., H, W) -> float32 in [-1, 1]."""
    return x.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8, rounded to the nearest level; values outside are clipped."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def image_noise(shape, seed, n, device="cpu"):
    """A callable that returns fresh standard normal noise (n, *shape): image i draws from its own generator.

    The generators live on the CPU and are seeded with seed + i, so image i depends neither on n, nor on
    how images are put into batches, nor on the device.
    """
    own = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in own]).to(device)


def stamp(seed):
    """Text chunks for a PNG: the command that made it, and the seed."""
    command = " ".join(["python", pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command.encode("utf-8", "backslashreplace").decode(), "seed": str(seed)}     # names may be no UTF-8


def save_uint8(x, path, seed=0):
    """Write one uint8 picture (C, H, W), C = 1 or 3, as PNG with its stamp."""
    info = PngImagePlugin.PngInfo()
    for key, value in stamp(seed).items():
        info.add_text(key, value)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1, 2, 0).squeeze(2).cpu().numpy()).save(path, pnginfo=info)


def grid(x, nrow):
    """uint8 pictures (B, 1 or 3, H, W) as one (3, H', W'), nrow to a row, 2 px apart.

    This is torchvision's make_grid, whose import takes 1.2 s because it brings torch's compiler.
    """
    height, width = x.shape[2] + 2, x.shape[3] + 2
    nrow = min(nrow, len(x))
    sheet = torch.full((3, height * math.ceil(len(x) / nrow) + 2, width * nrow + 2), 255, dtype=torch.uint8)
    for i, picture in enumerate(x):
        top, left = i // nrow * height + 2, i % nrow * width + 2
        sheet[:, top:top + x.shape[2], left:left + x.shape[3]] = picture
    return sheet


def save_grid(x, path, nrow, seed=0):
    """Write x (B, C, H, W) in [-1, 1] as one PNG, nrow pictures to a row, 2 px apart."""
    save_uint8(grid(to_uint8(x), nrow), path, seed)


def save_png(x, folder, first=0, seed=0):
    """Write x (B, C, H, W) in [-1, 1] as folder/000000.png, ... counting from `first`."""
    for i, picture in enumerate(to_uint8(x), first):
        save_uint8(picture, pathlib.Path(folder) / f"{i:06d}.png", seed)


def save_gif(frames, path, nrow, ms=60, colours=128):
    """Write a list of uint8 pictures (B, C, H, W), nrow to a row, as an animation that rests at its end."""
    frames = [grid(x, nrow).permute(1, 2, 0).numpy() for x in frames]
    frames = [Image.fromarray(x).quantize(colours) for x in frames]
    duration = [ms] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def save_table(rows, path):
    """Write dicts as CSV, a line each; the columns are all their keys, in the order of their first appearance."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(k for r in rows for k in r)))
        table.writeheader()
        table.writerows(rows)


# ---------------------------------------------------------------- data that needs no photographs

def drawn_faces(n, size=64, seed=0):
    """n drawn animal faces -> (x uint8 (n, 3, size, size), y (n,) in 1..3, names); a function of the seed.

    The three kinds differ in the ears (floppy, pointed, round) and in their fur (plain, plain, striped).
    Colours, pose, turn of the head, light and background vary alike in all: none gives the kind away.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3 + 1
    x = torch.cat([_draw(part, size, g) for part in y.split(250)])
    return x, y, ["floppy", "pointed", "striped"]


def _draw(y, size, g):
    """One batch of drawn faces: shapes painted back to front, each with an edge one pixel soft."""
    n = len(y)

    def between(lo, hi, channels=0):
        return lo + (hi - lo) * torch.rand((n, channels, 1, 1) if channels else (n, 1, 1), generator=g)

    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    angle, zoom = between(-0.35, 0.35), between(0.85, 1.15)
    u, v = right - between(-0.15, 0.15), down - between(-0.05, 0.2)
    u, v = (u * angle.cos() + v * angle.sin()) / zoom, (v * angle.cos() - u * angle.sin()) / zoom
    turn, wide = between(-0.12, 0.12), between(0.46, 0.58)        # features slide across a turned head
    tilt = between(-1, 1)[:, None] * right + between(-1, 1)[:, None] * down
    picture = (between(0.15, 0.95, 3) + 0.25 * between(-1, 1, 3) * tilt).clamp(0, 1)
    fur = between(0.0, 1.0, 1) * torch.tensor([0.55, 0.45, 0.35])[:, None, None] + between(0.2, 0.42, 3)
    dark, pale = 0.35 * fur, 0.55 * fur + 0.45
    kind = y[:, None, None]

    def paint(inside, colour):      # inside: (n, size, size), depth within the shape, in half pictures
        nonlocal picture
        cover = (inside * zoom * size / 2 + 0.5).clamp(0, 1)[:, None]
        picture = picture + cover * (colour - picture)

    def ellipse(cu, cv, ru, rv):
        return (1 - (((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2).sqrt()) * ru    # exact for circles

    def triangle(p, *corners):      # p: (u, v); corners clockwise on the screen
        sides = zip(corners, corners[1:] + corners[:1], strict=True)
        return torch.stack([((x1 - x0) * (p[1] - y0) - (y1 - y0) * (p[0] - x0)) / math.hypot(x1 - x0, y1 - y0)
                            for (x0, y0), (x1, y1) in sides]).amin(0)

    def only(k, inside):
        return torch.where(kind == k, inside, torch.full_like(inside, -1.0))

    inner = pale * torch.tensor([1, 0.8, 0.8])[:, None, None]
    for sign in (-1, 1):
        lean = sign * (u - turn * 0.3)                            # coordinate that grows towards this ear
        pointed = triangle((lean, v), (0.08, -0.3), (0.4, -0.92), (0.56, -0.2))
        rounded = ellipse(sign * 0.42 + turn * 0.3, -0.42, 0.21, 0.21)
        for shrink, colour in ((0.0, fur * 0.85), (0.06, inner)):
            paint(only(2, pointed - shrink), colour)
            paint(only(3, rounded - shrink), colour)
    paint(ellipse(0, 0, wide, between(0.5, 0.6)), fur)
    stripes = torch.sin(18 * (v + 0.5 * (u - turn).abs()) + between(0, 6.3)) * 0.03 - 0.008
    stripes = torch.where((u - turn).abs() > between(0.1, 0.2), stripes, torch.full_like(stripes, -1.0))
    paint(only(3, torch.minimum(stripes, ellipse(0, 0, wide, wide))), dark)
    for sign in (-1, 1):                                          # floppy ears hang over the head's sides
        paint(only(1, ellipse(sign * wide + turn * 0.3, 0.02, 0.17, 0.42)), dark * 1.5)
    paint(ellipse(turn * 1.6, 0.27, 0.25 * wide / 0.5, between(0.17, 0.23)), pale)
    gap, high, iris = between(0.18, 0.25), between(-0.16, -0.04), between(0.1, 0.9, 3)
    for sign in (-1, 1):
        at = turn * 1.2 + sign * gap
        paint(ellipse(at, high, 0.10, 0.09), iris)
        paint(ellipse(at + turn * 0.2, high, 0.05, 0.07), torch.zeros(3, 1, 1) + 0.04)
        paint(ellipse(at - 0.03, high - 0.03, 0.02, 0.02), torch.ones(3, 1, 1))
    paint(ellipse(turn * 1.9, 0.17, 0.09, 0.06), torch.zeros(3, 1, 1) + 0.08)
    for sign in (-1, 1):
        ring = ellipse(turn * 1.8 + sign * 0.07, 0.27, 0.07, 0.06).abs()
        paint(torch.where(v > 0.27, 0.014 - ring, torch.full_like(ring, -1.0)), dark * 0.6)
    picture = picture * (1 + 0.25 * tilt)                         # light from one side
    picture = picture + 0.01 * torch.randn(picture.shape, generator=g)
    return to_uint8(picture * 2 - 1)


def fashion_mnist(split):
    """Fashion-MNIST -> uint8 (N, 1, 32, 32), labels 1..10, names; torchvision downloads it into data/."""
    from torchvision.datasets import FashionMNIST
    try:
        kept = FashionMNIST("data", train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        stop(f"Fashion-MNIST could not be downloaded ({error}); --data drawn needs no network.")
    return torch.nn.functional.pad(kept.data[:, None], (2, 2, 2, 2)), kept.targets + 1, kept.classes


# ---------------------------------------------------------------- points in the plane

def points(name, n, generator=None, labels=False):
    """n points of a set in SETS -> float32 (n, 2); with labels also y (n,) in 1..K, the point's part.

    The courses shift by one number, the mean of all coordinates, and scale their standard deviation to 2.
    Here both numbers are those of the distribution, not of a sample, so that points are independent draws.
    """
    def uniform():
        return torch.rand(n, generator=generator, dtype=torch.float64)

    part = torch.zeros(n, dtype=torch.long)
    if name == "swiss_roll":   # sklearn's make_swiss_roll(hole=True) without its middle coordinate
        turn = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])[(8 * uniform()).long()]
        a = math.pi * (1.5 + turn + uniform())
        x = (torch.stack([a * a.cos(), a * a.sin()], 1) - 1.659155) / 6.765557 * 2
    elif name == "moons":
        part = (2 * uniform()).long()
        a = math.pi * uniform()
        outer, inner = torch.stack([a.cos(), a.sin()], 1), torch.stack([1 - a.cos(), 0.5 - a.sin()], 1)
        x = (torch.where(part[:, None] == 0, outer, inner) - 0.375) / 0.716045 * 2
    elif name == "circles":    # radii 4 and 2
        part = (2 * uniform()).long()
        a = 2 * math.pi * uniform()
        x = torch.stack([a.cos(), a.sin()], 1) * (4.0 - 2.0 * part[:, None])
    elif name == "scurve":
        a = 3 * math.pi * (uniform() - 0.5)
        x = torch.stack([a.sin(), a.sign() * (a.cos() - 1)], 1) / 1.101003 * 2
    elif name == "checkerboard":   # 4 x 4 fields of side pi, those with sin x sin y < 0
        column, row = (4 * uniform()).long(), (2 * uniform()).long()
        row = 2 * row + (column + 1) % 2
        x = torch.stack([column + uniform() - 2, row + uniform() - 2], 1) * math.sqrt(3)
    elif name == "gaussians":  # 8 modes on a circle of radius 4
        part = (8 * uniform()).long()
        a = part * math.pi / 4
        x = torch.stack([a.cos(), a.sin()], 1) * 4
        x = x + 0.3 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    elif name == "normal":
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    else:
        raise ValueError(f"no point set {name!r}: one of {', '.join(SETS)}")
    return (x.float(), part + 1) if labels else x.float()


def chamfer(a, b):
    """Chamfer distance of KAIST's assignments: SUM over points of squared nearest distances, both ways.

    a (n, 2), b (m, 2). It grows with n and m: their thresholds (20, 40, 60) are for 2048 + 2048 points, where
    two draws of the same swiss roll are 0.4 apart.
    """
    d = torch.cdist(a.double(), b.double()).square()
    return (d.amin(1).sum() + d.amin(0).sum()).item()


def chamfer_mean(a, b, clouds=100):
    """Chamfer distance of KAIST's SDE tutorial (pytorch3d's): means instead of sums, over small clouds.

    a, b (n, 2) with n divisible by `clouds`: 10,000 points make 100 clouds of 100. Most of the value is the
    sparseness of the clouds: two draws of the same swiss roll are 0.076 apart.
    """
    a, b = a.double().reshape(clouds, -1, 2), b.double().reshape(clouds, -1, 2)
    d = torch.cdist(a, b).square()
    return (d.amin(2).mean(1) + d.amin(1).mean(1)).mean().item()


def emd(a, b):
    """Earth mover's distance of two clouds (n, 2) of equal size: mean distance in the best pairing."""
    from scipy.optimize import linear_sum_assignment
    if a.shape != b.shape:
        raise ValueError(f"emd pairs clouds of equal size, got {tuple(a.shape)} and {tuple(b.shape)}")
    d = torch.cdist(a.double(), b.double()).cpu().numpy()
    return float(d[linear_sum_assignment(d)].mean())


def distances(x, ref):
    """The three distances of points x from as many others, (n, 2), n >= 100: a dict for report. Stops if x isn't finite.

    chamfer and EMD take the first 2048 points, chamfer_mean takes clouds of 100.
    """
    if not x.isfinite().all():
        stop("the samples are not finite; train with a smaller --lr.")
    k = len(x) // 100
    return {"chamfer": chamfer(x[:2048], ref[:2048]), "EMD": emd(x[:2048], ref[:2048]),
            "chamfer_mean": chamfer_mean(x[:100 * k], ref[:100 * k], k)}


# ---------------------------------------------------------------- holes in pictures, and measures of a fill

def known_pixels(name, size, resize=False):
    """The pixels kept: bool (1, 1, size, size). box is KAIST's 32 x 32 of 64 x 64; thin: every second row.

    Any other name is a black-and-white picture's path, white kept. Stops when it can't be read, is of
    another size (unless resize), or leaves nothing to fill or nothing to go by.
    """
    known = torch.ones(size, size, dtype=torch.bool)
    if name == "box":
        known[size // 4:size - size // 4, size // 4:size - size // 4] = False
    elif name == "half":
        known[:, size // 2:] = False
    elif name == "thin":
        known[1::2] = False
    else:
        try:
            picture = read_rgb(name).convert("L")
        except Exception as error:   # PIL raises half a dozen kinds on broken files
            stop(f"hole {name!r} is none of box, half, thin, and no readable picture ({error}); --help says what else there is.")
        if picture.size != (size, size):
            if not resize:
                stop(f"hole picture {name} is {picture.width} x {picture.height}, the pictures are "
                            f"{size} x {size}; draw it at that size, or say --resize.")
            picture = picture.resize((size, size), Image.NEAREST)
        known = torch.from_numpy(np.array(picture)) >= 128
    if known.all() or not known.any():
        stop(f"{name} keeps {'all' if known.all() else 'none'} of the pixels (white is kept); "
                    "paint the hole black and the rest white.")
    return known[None, None]


def open_images(paths, n, args):
    """The pictures that paths name -> float (N, C, size, size) in [-1, 1]; of a folder, n evenly; grey if the network is.

    paths None: the generated faces in assets/.
    """
    if not paths and not FACES.is_dir():
        stop(f"no folder {FACES}; copy it beside the script, or name a picture with --image.")
    files = []
    for path in map(pathlib.Path, paths or [FACES]):
        inside = [path] if not path.is_dir() else picture_files(path)
        if not inside:
            stop(f"{path} holds no picture ({', '.join(sorted(SUFFIXES))}); give another.")
        files += [inside[i * len(inside) // n] for i in range(n)] if len(inside) > n else inside
    x = to_float(torch.stack([open_image(p, args.size) for p in files]))
    grey = args.net["channels"] == 1 if args.net else args.data == "fashion-mnist"
    return to_float(to_uint8(x.mean(1, keepdim=True))) if grey else x


def psnr(a, b, where):
    """Peak signal to noise, dB, of a against b (B, C, H, W) in [-1, 1], over where (1, 1, H, W): (B,)."""
    mse = ((a - b).square() * where).sum((1, 2, 3)) / (where.sum() * a.shape[1])
    return 10 * torch.log10(4 / mse)                              # 4: the range 2, squared


def ssim(a, b, where):
    """Structural similarity (Wang et al. 2004, 11 x 11 Gaussian window of sd 1.5), mean over where: (B,)."""
    bell = torch.exp(-torch.arange(-5.0, 6.0).square() / (2 * 1.5 ** 2)).to(a.device)
    window = (bell[:, None] * bell / bell.sum() ** 2)[None, None]

    def local(x):
        return nn.functional.conv2d(nn.functional.pad(x.flatten(0, 1)[:, None], (5, 5, 5, 5), "reflect"), window).reshape(x.shape)

    m_a, m_b, c1, c2 = local(a), local(b), (0.01 * 2) ** 2, (0.03 * 2) ** 2
    v_a, v_b, v_ab = local(a * a) - m_a ** 2, local(b * b) - m_b ** 2, local(a * b) - m_a * m_b
    index = (2 * m_a * m_b + c1) * (2 * v_ab + c2) / ((m_a ** 2 + m_b ** 2 + c1) * (v_a + v_b + c2))
    return (index * where).sum((1, 2, 3)) / (where.sum() * a.shape[1])


def seam(x, known):
    """Mean |difference| of neighbours across the hole's edge, x (B, C, H, W) -> (B,); nan without an edge."""
    total, count = 0.0, 0
    for dim in (2, 3):
        edge = known.float().diff(dim=dim) != 0
        total = total + (x.diff(dim=dim).abs() * edge).sum((1, 2, 3))
        count = count + edge.sum() * x.shape[1]
    return total / count


def score_fills(x, original, where, **columns):
    """Rows for report, one for each picture of x (B, C, H, W) as it is saved: columns, psnr_dB, ssim, seam.

    The first two are taken over where (1, 1, H, W), seam across its edge and as a multiple of the originals' mean.
    A column is one value for all pictures or a list of B.
    """
    x, original, where = to_float(to_uint8(x)).cpu(), original.cpu(), where.cpu()
    columns = {k: v if isinstance(v, list) else [v] * len(x) for k, v in columns.items()}
    columns["psnr_dB"] = psnr(x, original, where).tolist()
    columns["ssim"] = ssim(x, original, where).tolist()
    columns["seam"] = (seam(x, ~where) / seam(original, ~where).mean()).tolist()
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def add_gains(rows):
    """Add to rows of score_fills with a method and a picture: gain_dB over the first method on the same picture, gain_se.

    gain_se is the standard error of the method's mean gain: methods on the same pictures are compared by it, not by the
    spread of psnr_dB, most of which is the pictures'.
    """
    first = {row["picture"]: row["psnr_dB"] for row in rows if row["method"] == rows[0]["method"]}
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        gains = [row["psnr_dB"] - first[row["picture"]] for row in members]
        for row, gain in zip(members, gains):
            row.update(gain_dB=gain, gain_se=float(np.std(gains)) / max(1, len(gains) - 1) ** 0.5)


# ---------------------------------------------------------------- figures and tables

INK, GREY, BLUE, ORANGE, GREEN, RED, PINK, SKY = "#222222 #BBBBBB #0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9".split()


def new_figure(rows=1, columns=1, width=6, height=4, **options):
    """matplotlib's (figure, axes) of rows x columns, drawn without a display."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def save_figure(figure, path, seed=0):
    """Write a figure as PNG with its stamp, and close it."""
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=120, metadata=stamp(seed))
    plt.close(figure)


def save_rows(rows, path, seed=0, most=10):
    """Write pictures (B, C, H, W) in [-1, 1], doubled in size: a row for each name, the name at its left, `most` in a row."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n = min(most, max(map(len, rows.values())))
    x = to_uint8(torch.cat([x[:n].cpu() for x in rows.values()]))
    picture = grid(x, n).permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
    left, (height, width, _) = 24 + 9 * max(map(len, rows)), picture.shape        # in pixels of the file
    figure = plt.figure(figsize=((left + width) / 120, height / 120), dpi=120)
    figure.figimage(picture, left, 0)
    for i, name in enumerate(rows):
        figure.text((left - 8) / (left + width), 1 - (i + 0.5) / len(rows), name, ha="right", va="center", fontsize=9)
    save_figure(figure, path, seed)


def save_walk(levels, path, seed=0):
    """A figure of the level after each move of a sampler that goes down, and now and then up."""
    figure, axes = new_figure(1, 1, 6, 3)
    axes.plot(levels, lw=1, color=BLUE)
    down = sum(s < t for t, s in zip(levels, levels[1:]))
    axes.set(xlabel="move", ylabel="level t", title=f"{len(levels) - 1} moves, {down} of them down (network evaluations)")
    axes.grid(alpha=0.3)
    save_figure(figure, path, seed)


def panels(rows, titles=None, row_titles=None, colours=None, limit=4.6, side=2.2):
    """A figure of point clouds: rows of (n, 2) tensors (None: an empty place) -> (figure, axes (R, C)).

    titles: rows of strings, or one row for the top. colours: a colour, or n values of an angle (a cyclic map), for all
    panels or as rows. limit: the half side of what is shown.
    """
    columns = max(map(len, rows))
    figure, axes = new_figure(len(rows), columns, side * columns + 0.3 * bool(row_titles), side * len(rows) + 0.3, squeeze=False)
    for r, row in enumerate(rows):
        for c in range(columns):
            axis, x = axes[r, c], row[c] if c < len(row) else None
            if x is None:
                axis.axis("off")
                continue
            tint = colours[r][c] if isinstance(colours, list) else BLUE if colours is None else colours
            values = {} if isinstance(tint, str) else dict(cmap="hsv", vmin=-math.pi, vmax=math.pi)
            axis.scatter(*x[:3000].T, s=1.5, c=tint if isinstance(tint, str) else tint[:3000], linewidths=0, **values)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
            title = "" if not titles else titles[c] if isinstance(titles[0], str) and r == 0 else titles[r][c] if not isinstance(titles[0], str) else ""
            axis.set_title(title, fontsize=9)
        if row_titles:
            axes[r, 0].set_ylabel(row_titles[r], fontsize=10)
    return figure, axes


def animate(frames, path, titles=None, colours=None, limit=4.6, side=2.2, ms=80):
    """Write a GIF of point clouds side by side: frames[i] is a list of (n, 2) tensors, titles[i] a string or a list of them.

    colours as in panels, for all frames. The last frame rests for two seconds.
    """
    pictures = []
    for i, frame in enumerate(frames):
        over = None if titles is None else [titles[i]] * len(frame) if isinstance(titles[i], str) else titles[i]
        figure, _ = panels([frame], over, None, None if colours is None else [colours] if isinstance(colours, list) else colours, limit, side)
        file = io.BytesIO()
        figure.savefig(file, dpi=60, format="png")
        matplotlib.pyplot.close(figure)
        pictures.append(Image.open(file).convert("RGB").quantize(32, dither=Image.Dither.NONE))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[ms] * (len(pictures) - 1) + [2000], loop=0, optimize=True)


def save_paths(paths, folder, seed=0, clock=lambda t: t, frames=26):
    """paths.png and paths.gif in a folder: clouds of points on their way. paths[title] is a list of (t, x_t), x_t (n, 2).

    Six clouds of each (figure, a row for each title) and `frames` (GIF), from the first to the last at times at which
    clock(t) is even. A point keeps the colour of the angle at which it starts. A cloud wider than the frame is shrunk,
    as its title says.
    """
    paths = dict(paths)
    for title, path in paths.items():
        at = clock(torch.tensor([t for t, _ in path]))
        paths[title] = [path[(at - goal).abs().argmin()] for goal in np.linspace(float(at[0]), float(at[-1]), frames)]
    colours = [torch.atan2(path[0][1][:, 1], path[0][1][:, 0]) for path in paths.values()]
    shrink = [[max(1.0, float(x.std()) / 2) for _, x in path] for path in paths.values()]
    clouds = [[x / by for (_, x), by in zip(path, row, strict=True)] for path, row in zip(paths.values(), shrink, strict=True)]
    titles = [[f"t = {t:{'.2g' if t < 99 else '.0f'}}" + f", divided by {by:.2g}" * (by > 1.05) for (t, _), by in zip(path, row, strict=True)]
              for path, row in zip(paths.values(), shrink, strict=True)]
    six = [round(i * (len(clouds[0]) - 1) / 5) for i in range(6)]
    figure, _ = panels([[row[i] for i in six] for row in clouds], [[row[i] for i in six] for row in titles], list(paths), [[c] * 6 for c in colours])
    save_figure(figure, pathlib.Path(folder) / "paths.png", seed)
    over = [[f"{name}\n{title}" for name, title in zip(paths, frame, strict=True)] for frame in zip(*titles, strict=True)]
    animate(list(zip(*clouds, strict=True)), pathlib.Path(folder) / "paths.gif", over, colours)


def save_curves(curves, path, seed=0, xlabel="t", ylabel="", every=25):
    """A row of plots: curves[title] = (t, {label: (exact, simulated)}), a line and every so many-th value as a circle."""
    figure, axes = new_figure(1, len(curves), 3.3 * len(curves), 3.2, squeeze=False)
    for axis, (title, (t, lines)) in zip(axes[0], curves.items(), strict=True):
        for (label, (exact, simulated)), colour in zip(lines.items(), (BLUE, RED, GREEN, ORANGE), strict=False):
            axis.plot(t, exact, color=colour, label=label)
            axis.plot(t[::every], simulated[::every], "o", ms=4, mfc="none", color=colour)
        largest = max(float(exact.max()) for exact, _ in lines.values())
        axis.set(title=title, xlabel=xlabel)
        if largest > 10:
            axis.set_yscale("asinh", linear_width=0.5)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, 0].plot([], [], "o", ms=4, mfc="none", color=INK, label="simulated")
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path, seed)


def save_clouds(rows, path, seed=0, reference=None):
    """A figure of point clouds: rows[title] = {name: (n, 2)}; with the chamfer distance of 2048 points from a reference."""
    def title(name, x):
        distance = 0.0 if reference is None else chamfer(x[:2048], reference[:2048])
        return name if reference is None else f"{name}, chamfer {distance:{'.3g' if distance >= 100 else '.2g'}}"
    names = [[title(name, x) for name, x in row.items()] for row in rows.values()]
    figure, _ = panels([list(row.values()) for row in rows.values()], names, list(rows))
    save_figure(figure, path, seed)


def save_arrows(rows, clouds, titles, path, seed=0):
    """A figure of vector fields: rows[title] is a list of fields (n, 2), which stand as arrows on clouds of points (n, 2).

    The first 300 arrows of each cloud are drawn.
    """
    figure, axes = panels([clouds] * len(rows), titles, list(rows), GREY, side=3)
    for axis_row, fields, colour in zip(axes, rows.values(), (BLUE, ORANGE, GREEN), strict=False):
        for axis, x, field in zip(axis_row, clouds, fields, strict=True):
            axis.quiver(*x[:300].T, *field[:300].T, color=colour, width=0.005, scale=25, zorder=2)
    save_figure(figure, path, seed)


def save_densities(densities, limit, path, seed=0):
    """Heat maps of log densities in nats: densities[title] is (n * n,) on torch.cartesian_prod of n ticks from -limit to limit.

    Each title also says the mass in the frame, which is 1 if all of the density is there.
    """
    figure, axes = new_figure(1, len(densities), 4.1 * len(densities) + 0.6, 4.3, squeeze=False)
    for axis, (title, logp) in zip(axes[0], densities.items(), strict=True):
        side = math.isqrt(len(logp))
        mass = float(logp.exp().sum()) * (2 * limit / (side - 1)) ** 2
        image = axis.imshow(logp.view(side, side).T.numpy(), origin="lower", vmin=-7, vmax=0)
        axis.set(title=f"{title}: mass {mass:.3f}", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes, label="log density, nats", extend="both")
    save_figure(figure, path, seed)


def save_losses(losses, path, seed=0, ylabel="loss", **references):
    """The curve of losses (iters,), as means of a fiftieth, with a dashed line for each reference (label: value)."""
    width = max(1, len(losses) // 50)
    smooth = losses[:len(losses) // width * width].view(-1, width).mean(1)
    figure, axis = new_figure(1, 1, 6, 3.5)
    axis.plot(width * torch.arange(1, len(smooth) + 1), smooth, color=BLUE, label=f"training, mean of {width}")
    for (label, value), colour in zip(references.items(), (ORANGE, GREEN, RED), strict=False):
        axis.axhline(value, color=colour, ls="--", label=label)
    low, high = min([float(smooth.min()), *references.values()]), float(smooth.median())
    axis.set(xlabel="iteration", ylabel=ylabel, ylim=(low - 0.5 * (high - low) - 0.01, high + 4 * (high - low) + 0.01))
    axis.legend()
    save_figure(figure, path, seed)


def save_loglog(lines, path, seed=0, dashed=None, xlabel="", ylabel=""):
    """A figure on logarithmic axes: lines[label] = (x, y); those from number `dashed` on are dashed."""
    figure, axis = new_figure(1, 1, 6.5, 5)
    dashed = len(lines) if dashed is None else dashed
    for i, (label, (x, y)) in enumerate(lines.items()):
        axis.loglog(x, y, "o-" if i < dashed else "s--", ms=3.5, lw=1.2, label=label, color=(BLUE, ORANGE, GREEN, RED, PINK, SKY, INK)[i % 7])
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    save_figure(figure, path, seed)


def recorded(f, path):
    """f(x, t), t one number or the same for all points, which also appends (t, x) of each call to the list path."""
    def call(x, t):
        path.append((float(t.flatten()[0]), x))
        return f(x, t)
    return call


def report(rows, by, path, over=("seed",)):
    """Print rows (dicts, one for each seed) as a Markdown table of mean and standard deviation over seeds; write all to CSV.

    by: the names of the columns that say what a row is; the other columns, but those it is taken over, are numbers.
    """
    save_table(rows, path)
    numbers = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in by and k not in over]
    print("| " + " | ".join([*by, *numbers]) + " |\n" + "|-" * (len(by) + len(numbers)) + "|")
    for key in dict.fromkeys(tuple(r[k] for k in by) for r in rows):
        cells = []
        for name in numbers:
            values = [float(r[name]) for r in rows if tuple(r[k] for k in by) == key and name in r]
            spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 and np.std(values) > 0 else ""
            cells.append(f"{np.mean(values):.3g}{spread}" if values else "")
        print("| " + " | ".join([*map(str, key), *cells]) + " |")


# ---------------------------------------------------------------- AFHQ

def download(url, path, sha256=None):
    """Fetch url into path, on from where a transfer broke off. Stops on a wrong length or hash."""
    path, part = pathlib.Path(path), pathlib.Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(5):
        trouble, have = "sent too little", part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as reply:
                if reply.status != 206:                        # the server starts over, so do we
                    have = 0
                rest = reply.headers.get("Content-Length", "")
                total = have + int(rest) if rest.isdecimal() else None
                with open(part, "ab" if have else "wb") as file, tqdm(
                        total=total, initial=have, unit="B", unit_scale=True, desc=path.name,
                        disable=None) as bar:
                    while chunk := reply.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
            if total is None or part.stat().st_size == total:
                break
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:                     # nothing left, or a part that isn't one
                part.unlink()
            elif error.code < 500:
                stop(f"{url} answers {error.code} {error.reason}; give another address with --url.")
            trouble = f"answered {error.code} {error.reason}"
        except ValueError:
            stop(f"{url!r} is no address; give one with --url.")
        except (OSError, http.client.HTTPException) as error:
            trouble = f"broke off ({error})"
        print(f"{url} {trouble}, trying again", file=sys.stderr)
    else:
        stop(f"{url} {trouble} five times; run the same command again" + (f" to go on from {part}." if part.exists() else " later."))
    if sha256 and hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        stop(f"{url} is not the expected file (its hash differs); give another address with --url.")
    os.replace(part, path)


def unpack(archive, folder):
    """Unpack a zip; stops, with nothing written, at a member whose path would leave the folder."""
    folder = pathlib.Path(folder).resolve()
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if not (folder / member.filename).resolve().is_relative_to(folder):
                    stop(f"{archive} holds {member.filename!r}, which leads out of {folder}; don't use it.")
            for member in tqdm(file.infolist(), "unpacking", leave=False, disable=None):
                file.extract(member, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:      # RuntimeError: encrypted
        stop(f"{archive} is no complete zip file that can be read ({error}); delete it and run the command again.")


def build_eval(root, size):
    """Write root/eval/CLASS/*.png: the val split by the resize rule of training, lossless, in place of an earlier one.

    Stops when eval holds pictures that were not made here (a course's program writes there too): FID would measure both.
    """
    folder, new = pathlib.Path(root) / "eval", pathlib.Path(root) / "eval.new"
    x, y, names = load_images(root, "val", size)
    foreign = [path for path in picture_files(folder) if not made_here(path)]
    if foreign:
        stop(f"{folder} holds pictures that were not made here, such as {foreign[0].name}; move that folder away first.")
    remove_pictures(new)
    for i, picture in enumerate(tqdm(x, "eval", leave=False, disable=None)):
        save_uint8(picture, new / names[y[i] - 1] / f"{i:06d}.png")
    replace_pictures(folder, new)
    return len(x)


def get_afhq(root, url):
    """AFHQ into root/train and root/val: from afhq.zip beside root, which is downloaded first unless it is there."""
    archive, missing = root.parent / "afhq.zip", [root / split for split in ("train", "val") if not (root / split).is_dir()]
    if not archive.is_file():
        if len(missing) == 1:
            stop(f"no {missing[0]}, and no {archive} to unpack it from; put pictures of each class into {missing[0]}/CLASS.")
        download(url, archive)
    with tempfile.TemporaryDirectory(dir=root.parent) as inside:       # a broken-off unpacking leaves nothing
        unpack(archive, inside)
        found = sorted(pathlib.Path(inside).glob("**/train"))
        if not found or not (found[0].parent / "val").is_dir():
            stop(f"{archive} holds no folders `train` and `val` beside each other; delete it and give another --url.")
        root.mkdir(parents=True, exist_ok=True)
        for split in missing:
            (found[0].parent / split.name).rename(split)


def draw_samples(args):
    """OUT/samples.png: eight pictures of each class of data that needs no photographs; OUT/points.png: the point sets."""
    x, y, names = load_images(args.data, "train", args.size)
    pick = torch.cat([(y == k + 1).nonzero()[:8, 0] for k in range(len(names))])
    save_grid(to_float(x[pick]), args.out / "samples.png", 8, args.seed)
    print(f"{args.out / 'samples.png'}: {len(names)} classes ({', '.join(names)}), {len(x)} pictures in all")
    drawn = [points(name, 3000, torch.Generator().manual_seed(args.seed), labels=True) for name in SETS]
    x, colours = [x for x, _ in drawn], [BLUE if y.max() == 1 else 2 * math.pi * (y - 0.5) / y.max() - math.pi for _, y in drawn]
    figure, _ = panels([x[:4], x[4:]], [SETS[:4], SETS[4:]], None, [colours[:4], colours[4:]], limit=5.2)
    save_figure(figure, args.out / "points.png", args.seed)
    print(f"{args.out / 'points.png'}: {len(SETS)} point sets, coloured by part")


def parse_args(argv=None):
    p = parser("Download AFHQ and build its evaluation set, or draw the data that needs no download.", "common", "data", "size")
    p.add_argument("--url", default=AFHQ, help="where AFHQ's zip file is")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.data in ("drawn", "fashion-mnist"):
        return draw_samples(prepare(args))
    root = pathlib.Path(args.data)
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        get_afhq(root, args.url)
    count = build_eval(args.data, args.size)
    print(f"{root / 'eval'}: {count} pictures, {args.size} x {args.size} PNG")


if __name__ == "__main__":
    run(main)
