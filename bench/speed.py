r"""How fast are the network and the training step of cfg_afhq.py, and what does each way to run them gain?

A row is one way to run one network. It gives the seconds of a training step (loss, backward pass,
clipping, Muon, average of the weights) and of a forward pass without gradient, which is one network
evaluation of a sampler. Rates are by the wall clock, except where a single CPU thread works: then they
are by CPU seconds, which hold on a machine that others use too. torch counts the floating-point
operations (FLOP) of the network's products and convolutions, and their rate is given as a share of the
rate of a large bf16 product, if the hardware has bf16. fp32 excludes TF32.

Run
  python bench/speed.py                          all rows
  python bench/speed.py --only "default fp32" "default bf16 channels_last"
  OMP_NUM_THREADS=1 python bench/speed.py        one core, as in RESULTS.md

It writes OUT/speed.csv and prints a table as Markdown. It needs torch 2.1.
"""
import math
import pathlib
import sys
import time

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import cfg_afhq
import common
from bench import training

COURSE = ["--patch", "1", "--ch", "128", "--mult", "1", "2", "2", "2", "--blocks", "4", "--attn", "32"]
ROWS = {                                # name: flags of cfg_afhq.py, batch, bf16, channels_last, compiled
    "default fp32": ([], 32, False, False, False),
    "default fp32 channels_last": ([], 32, False, True, False),
    "default bf16 channels_last": ([], 32, True, True, False),
    "default bf16 channels_last compiled": ([], 32, True, True, True),
    "default bf16 channels_last batch 1": ([], 1, True, True, False),
    "default bf16 channels_last batch 256": ([], 256, True, True, False),
    "course fp32": (COURSE, 8, False, False, False),
    "course fp32 channels_last": (COURSE, 8, False, True, False),
    "course bf16 channels_last": (COURSE, 8, True, True, False),
    "course bf16 channels_last compiled": (COURSE, 8, True, True, True),
}


def seconds_of(work, device, seconds, least=3):
    """Mean wall and CPU seconds of work(), after two calls that warm up, over `seconds` or `least` calls."""
    def wait():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    work()
    work()
    wait()
    wall, cpu, n = time.time(), time.process_time(), 0
    while n < least or time.time() - wall < seconds:
        work()
        n += 1
        if n % least == 0:
            wait()
    wait()
    return (time.time() - wall) / n, (time.process_time() - cpu) / n


def counted(device, wall, cpu):
    """The seconds that rates are taken by: the wall's, or the CPU's where a single CPU thread works."""
    return cpu if device.type == "cpu" and torch.get_num_threads() == 1 else wall


def product_rate(device, seconds, side=4096):
    """FLOP/s of a bf16 product of two square matrices; nan where bf16 is emulated."""
    if not common.bf16("auto", device):
        return math.nan
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side ** 3 / counted(device, *seconds_of(lambda: a @ b, device, seconds))


def measure(name, device, seconds, peak):
    """One row: a way to run one network -> dict of numbers. peak: FLOP/s of the product."""
    from torch.utils.flop_counter import FlopCounterMode  # torch 2.1
    flags, batch, bf16, channels_last, compiled = ROWS[name]
    args = cfg_afhq.parse_args(flags)
    args.device, args.bf16, names = device, bf16, ["cat", "dog", "wild"]
    args.net = common.network_keywords(cfg_afhq.Network, args, torch.zeros(1, 3, args.size, args.size), names)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network, ema, optimizer = training.begin(args, layout)
    alpha_bar = cfg_afhq.schedule(args.schedule, args.T)
    x0 = torch.rand(batch, 3, args.size, args.size, device=device) * 2 - 1
    y, t = torch.ones(batch, dtype=torch.long, device=device), torch.full((batch,), 500)

    def step(denoiser):
        training.step(args, 1000, network, ema, optimizer, denoiser, alpha_bar, x0, y)

    @torch.no_grad()
    def forward(denoiser):
        denoiser(x0, t, y)

    with FlopCounterMode(display=False) as counter:
        cfg_afhq.loss(cfg_afhq.Denoiser(network, alpha_bar, args.predict, bf16), x0, y, alpha_bar).backward()
    flop = counter.get_total_flops()
    run = torch.compile(network) if compiled else network
    denoiser = cfg_afhq.Denoiser(run, alpha_bar, args.predict, bf16)
    wall, cpu = seconds_of(lambda: step(denoiser), device, seconds)
    wall_forward, cpu_forward = seconds_of(lambda: forward(denoiser), device, seconds)
    if compiled:
        torch.compiler.reset()
    spent, spent_forward = counted(device, wall, cpu), counted(device, wall_forward, cpu_forward)
    return dict(name=name, parameters=sum(p.numel() for p in network.parameters()), batch=batch, step=wall,
                step_cpu=cpu, pictures_per_s=batch / spent, tflop=flop / 1e12,
                tflop_per_s=flop / spent / 1e12, share=flop / spent / peak, forward=wall_forward,
                forward_cpu=cpu_forward, forward_ms=1e3 * spent_forward / batch)


def measure_data(device, seconds, n=4096, batch=32):
    """Seconds of drawing one training batch, and of its conversion from uint8 alone."""
    x = torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8, device=device)
    batches = common.batches(x, torch.arange(n) % 3 + 1, batch)
    works = (lambda: next(batches)), (lambda: common.to_float(x[:batch]))
    return [counted(device, *seconds_of(work, device, seconds)) for work in works]


def parse_args(argv=None):
    p = common.parser(__doc__, "speed", "device")
    add = p.add_argument
    add("--only", nargs="+", choices=ROWS, metavar="ROW", help="these rows only (unset: all)")
    add("--seconds", type=common.checked(float, lambda s: 0 <= s < math.inf, "a finite number from 0 on"),
        default=10.0, help="duration of each measurement; three calls at least")
    return p.parse_args(argv)


def main(argv=None):
    args = common.prepare(parse_args(argv))
    torch.backends.cudnn.allow_tf32 = False
    peak = product_rate(args.device, args.seconds)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}: a bf16 product, "
          f"side 4096, runs at {peak / 1e12:.2f} TFLOP/s")
    whole, part = measure_data(args.device, args.seconds / 5)
    print(f"a batch of 32 pictures: {1e3 * whole:.2f} ms, {1e3 * part:.2f} of them its conversion from uint8")
    rows = []
    for name in tqdm(args.only or ROWS, "rows", disable=None):
        rows.append(measure(name, args.device, args.seconds, peak))
        common.save_table(rows, args.out / "speed.csv")
    print("| network, batch | step, s (CPU s) | pictures/s | ratio to its first row | TFLOP/s (share) | "
          "forward, ms a picture |\n|-|-|-|-|-|-|")
    first = {}
    for r in rows:
        pictures_per_s = first.setdefault(r["name"].split()[0], r["pictures_per_s"])
        share = "" if math.isnan(peak) else f" ({r['share']:.0%})"
        print(f"| {r['name']}, {r['parameters'] / 1e6:.1f} M, {r['batch']} | "
              f"{r['step']:.3g} ({r['step_cpu']:.3g}) | "
              f"{r['pictures_per_s']:.3g} | {r['pictures_per_s'] / pictures_per_s:.2f} | "
              f"{r['tflop_per_s']:.3g}{share} | {r['forward_ms']:.3g} |")
    print(f"{args.out / 'speed.csv'}: {len(rows)} rows")


if __name__ == "__main__":
    common.run(main)
