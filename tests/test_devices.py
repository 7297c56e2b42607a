"""Losses, backward passes and samplers on a GPU that isn't there: a tensor on the wrong device fails, and so does float64 on a Mac.

Tensors on the device are fake (torch's FakeTensorMode: shapes, types and devices without numbers); what stays on the CPU
is real, so that schedules, levels and the choices that depend on them work as ever. The device is called "lazy": of torch's
names for devices that no machine need have, it is one on which autograd runs. For CUDA and MPS it wants the real thing.
"""
import pytest
import torch

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
except ImportError:                # this part of torch is not a public one
    pytest.skip("this torch has fake tensors of another kind", allow_module_level=True)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import cfg_afhq
import common
import ddim_afhq
import ddpm_afhq
import fid
import inpaint_afhq
import mcg_inpaint


class Elsewhere(TorchDispatchMode):
    """Work on CPU tensors is done; work on others is only checked. No float64 may be made on `device`, as a Mac has none."""

    def __init__(self, device):
        super().__init__()
        self.device, self.made = torch.device(device), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_flatten((args, kwargs or {}))[0]
        if not any(isinstance(a, FakeTensor) or isinstance(a, torch.device) and a.type != "cpu" for a in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor) and x.device.type == self.device.type:
                self.made += 1
                assert x.dtype != torch.float64, f"{func} made float64 on {x.device}"
        return out


def too_old():
    """Whether this torch, older than 2.10, can't move a fake tensor to such a device: 2.6 can't."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Elsewhere("lazy"):
            torch.zeros(2).to("lazy").add(1)
    except NotImplementedError:
        return tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10)
    return False


pytestmark = pytest.mark.skipif(too_old(), reason="this torch can't make fake tensors on a device that isn't there")


@pytest.fixture
def device():
    """Inside, `device` stands for a machine's accelerator; the test must have worked there."""
    with FakeTensorMode(allow_non_fake_inputs=True), Elsewhere("lazy") as mode:
        yield torch.device("lazy")
    assert mode.made > 10


def noise_like(device, *shape):
    """A script's noise: drawn on the CPU, one generator for each picture, then moved."""
    return common.image_noise(shape[1:], 0, shape[0], device)


def network(script, device, **more):
    with torch.device(device):
        return script.Network(size=16, channels=3, ch=8, mult=[1], blocks=1, attn=[8], dropout=0.1, **more)


def check(loss, net, device):
    assert loss.device.type == device.type and loss.ndim == 0 and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.device.type == device.type for p in net.parameters())


# ---------------------------------------------------------------- losses: (script, what loss takes after x0)

LOSSES = {
    "ddpm": (ddpm_afhq, {}, lambda y, ab: (ab,)),
    "ddim": (ddim_afhq, {}, lambda y, ab: (ab,)),
    "cfg": (cfg_afhq, {"classes": 3}, lambda y, ab: (y, ab)),
}


@pytest.mark.parametrize(("name", "weight", "predict"), [("ddpm", "uniform", "eps"), *[(name, "min-snr", "v") for name in LOSSES]])
def test_loss_and_its_gradient(name, weight, predict, device):
    script, more, rest = LOSSES[name]
    net, alpha_bar = network(script, device, **more), script.schedule()
    x0, y = next(common.batches(torch.zeros(6, 3, 16, 16, dtype=torch.uint8).to(device), torch.tensor([1, 2, 3, 1, 2, 3]), 4))
    check(script.loss(script.Denoiser(net, alpha_bar, predict), x0, *rest(y, alpha_bar), weight, "huber"), net, device)
    ema = [p.detach().clone() for p in net.parameters()]
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    common.Muon(net.parameters(), lr=1e-3).step()
    for p_ema, p in zip(ema, net.parameters(), strict=True):
        p_ema.lerp_(p.detach(), 0.1)


# ---------------------------------------------------------------- samplers: name -> a call that returns x_0

def cfg_sample(solver, steps=3, **options):
    def call(denoiser, alpha_bar, noise, device):
        levels = cfg_afhq.levels_for(solver, alpha_bar, steps)
        return cfg_afhq.sample(denoiser, noise(), torch.tensor([1, 3]).to(device), alpha_bar, levels, noise, 2.0, solver, **options)
    return cfg_afhq, {"classes": 3}, call


def mcg_sample(method, task="box"):
    def call(denoiser, alpha_bar, noise, device):
        project, _ = mcg_inpaint.measurement(task, 16)
        return mcg_inpaint.sample(denoiser, noise(), alpha_bar, [1000, 500, 0], noise, project(torch.zeros(2, 3, 16, 16).to(device)), project, method)
    return mcg_inpaint, {}, call


SAMPLERS = {
    "ddpm": (ddpm_afhq, {}, lambda f, ab, z, d: ddpm_afhq.sample(f, z(), ab, [1000, 500, 0], z)),
    "ddpm large": (ddpm_afhq, {}, lambda f, ab, z, d: ddpm_afhq.sample(f, z(), ab, [1000, 500, 0], z, "large", clip=False)),
    "ddpm from a picture": (ddpm_afhq, {}, lambda f, ab, z, d: ddpm_afhq.sample(f, ddpm_afhq.diffuse(z(), ab[500], z()), ab, [500, 0], z)),
    "ddim": (ddim_afhq, {}, lambda f, ab, z, d: ddim_afhq.sample(f, common.slerp(z(), z(), 1), ab, [1000, 500, 0])),
    "ddim with noise": (ddim_afhq, {}, lambda f, ab, z, d: ddim_afhq.sample(f, z(), ab, [1000, 500, 0], z, eta=1.0)),
    "ddim upwards": (ddim_afhq, {}, lambda f, ab, z, d: ddim_afhq.sample(f, z(), ab, [0, 500, 1000], clip=False)),
    **{f"cfg {solver}": cfg_sample(solver) for solver in ("ddpm", "ddim", "dpm1", "dpm2", "dpm++2m")},
    "inpaint": (inpaint_afhq, {}, lambda f, ab, z, d: inpaint_afhq.sample(f, z(), ab, [1000, 500, 1000, 500, 0], z, torch.zeros(2, 3, 16, 16).to(d),
                                                                          common.known_pixels("box", 16).to(d))),
    **{f"mcg {method}": mcg_sample(method) for method in ("replace", "mcg", "dps", "pigdm", "mmps")},
    **{f"mcg {task}": mcg_sample("mcg", task) for task in ("sr2", "colour")},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(name, device):
    script, more, call = SAMPLERS[name]
    alpha_bar = script.schedule()
    args = type("Args", (), dict(gif=True, batches=1))
    denoiser = common.watch(script.Denoiser(network(script, device, **more).eval(), alpha_bar, "v"), args)
    x0 = call(denoiser, alpha_bar, noise_like(device, 2, 3, 16, 16), device)
    assert x0.shape == (2, 3, 16, 16) and x0.device.type == device.type and x0.dtype == torch.float32
    assert common.to_uint8(x0).cpu().device.type == "cpu" and args.evaluations > 0


def test_features_of_fid(device):
    with torch.device(device):
        net = fid.FaceNet(3).eval()
    with torch.no_grad():
        found = net(torch.zeros(2, 3, 64, 64).to(device))
    assert all(x.device.type == device.type for x in (found if isinstance(found, tuple) else [found]))


# ---------------------------------------------------------------- the check itself

def test_a_tensor_left_on_the_cpu_is_noticed(device):
    x = torch.zeros(3, 4).to(device)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="device"):
        torch.cat([x, torch.ones(3, 4)])
    assert (x + torch.ones(()).double()).dtype == torch.float32       # one number from the CPU is no mistake
    for _ in range(10):
        x = x + 1


def test_float64_on_the_device_is_noticed(device):
    x = torch.zeros(3, 4).to(device)
    with pytest.raises(AssertionError, match="float64"):
        x.double()
    with pytest.raises(AssertionError, match="float64"):
        torch.zeros(3, dtype=torch.float64).to(device)
    for _ in range(10):
        x = x + 1
