"""bench/peers.py: the course's network has its size, the contenders take turns, and a library may be missing."""
import csv
import re
import sys

import pytest
import torch
from torch import nn

import cfg_afhq
from bench import peers

CPU = torch.device("cpu")
TINY = ["--size", "16", "--patch", "2", "--ch", "8", "--mult", "1", "2", "--blocks", "1", "--attn", "8",
        "--batch", "2"]


class Toy(nn.Module):
    """Stands for a library's network: `width` channels at the first level."""

    def __init__(self, width, **_):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, xt, t):
        return self.last(self.first(xt))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(peers, "COURSE", [*TINY, "--patch", "1"])
    monkeypatch.setattr(peers, "DEFAULT", TINY)
    monkeypatch.setattr(peers, "PEERS", {"none": ("no_such_library", "Net", peers.diffusers)})


def run(tmp_path, *flags):
    peers.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path), *flags])
    with open(tmp_path / "peers.csv") as table, open(tmp_path / "peers_calls.csv") as calls:
        return list(csv.DictReader(table)), list(csv.DictReader(calls))


def test_the_course_s_network_has_its_size():
    with torch.device("meta"):
        plain, labelled = (peers.Course(64, 3, classes) for classes in (None, 3))
        counts = [peers.parameters(net) for net in (plain, labelled)]
        ours = cfg_afhq.parse_args(peers.COURSE)
    assert counts == pytest.approx([58.75e6] * 2, rel=0.01) and counts[1] - counts[0] == 4 * 512
    attentions = [m for m in plain.modules() if isinstance(m, peers.Attention)]
    assert len([m for m in plain.modules() if isinstance(m, peers.ResBlock)]) == 38 and len(attentions) == 10
    assert (ours.patch, ours.ch, ours.blocks, ours.attn, ours.dropout, ours.batch) == (1, 128, 4, [32], 0.1, 8)


def test_the_course_s_network_runs():
    net = peers.Course(16, 3, 3, ch=8, mult=(1, 2), blocks=1, attn=(8,))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 999]), torch.tensor([1, 3])
    assert net(x, t, y).shape == x.shape
    net.eval()
    assert torch.equal(net(x, t, y), net(x, t, y)) and not torch.equal(net(x, t, y), net(x, t, 0 * y))
    assert not torch.equal(net(x, t, y), net(x, t.flip(0), y))
    assert peers.Course(16, 3, ch=8, mult=(1, 2), blocks=1, attn=())(x, t).shape == x.shape


def test_attention_averages_the_values():
    layer = peers.Attention(8)
    for projection in (layer.q, layer.k):
        nn.init.zeros_(projection.weight)                            # every pixel then attends to all alike
        nn.init.zeros_(projection.bias)
    x = torch.randn(2, 8, 4, 4)
    mean = layer.v(layer.norm(x)).mean((2, 3), keepdim=True)
    assert torch.allclose(layer(x) - x, layer.proj(mean).expand_as(x), atol=1e-5)


def test_contenders_take_turns(monkeypatch):
    seen, clock = [], [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(peers.time, "process_time", lambda: clock[0] / 2)

    def work(name, seconds):
        def call():
            seen.append(name)
            clock[0] += seconds * len(seen)                          # the machine grows slower with every call
        return call

    calls = peers.alternate({"a": work("a", 1), "b": work("b", 2)}, 3, CPU)
    assert "".join(seen) == "aabb" + "ab" * 3
    assert calls == {"a": ((5, 2.5), (7, 3.5), (9, 4.5)), "b": ((12, 6), (16, 8), (20, 10))}
    row = peers.summary(calls, CPU)["b"]
    assert (row["wall"], row["cpu"], row["cpu_per_wall"]) == (16, 8, 0.5)
    assert [row[k] for k in ("ratio_least", "ratio", "ratio_most")] == pytest.approx([20 / 9, 16 / 7, 12 / 5])


def test_the_width_is_round_where_it_can_be():
    for wanted, width in ((96, 96), (97, 96), (48, 48), (38, 38), (41, 40), (1, 2)):
        assert peers.width_for(Toy, peers.parameters(Toy(wanted))) == width


def test_a_library_s_network_is_built_at_the_settings_of_ours(tiny):
    class Args:
        device, seed = CPU, 0
    own = peers.settings(TINY, Args, False)
    assert peers.levels(own) == ([1, 1, 2], [False, True, False])          # sides 16, 8, 4, and --attn 8
    net = peers.lucidrains(Toy, own, 8)
    assert net(own.x0, own.t, own.y).shape == own.x0.shape


@pytest.mark.parametrize("name", peers.PEERS)
def test_an_installed_library_has_as_many_parameters(name):
    package, network, build = peers.PEERS[name]
    network = getattr(pytest.importorskip(package), network)

    class Args:
        device, seed = CPU, 0
    own = peers.settings([], Args, False)
    with torch.device("meta"):
        wanted = peers.parameters(cfg_afhq.Network(**own.net))
        width = peers.width_for(lambda width: build(network, own, width), wanted)
        net = build(network, own, width)
    assert peers.parameters(net) == pytest.approx(wanted, rel=0.05) and peers.gflop(net, own) > 0


def test_main_writes_the_tables(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "toy_library", type("Library", (), {"Unet": Toy}))
    monkeypatch.setitem(peers.PEERS, "toy", ("toy_library", "Unet", peers.lucidrains))
    rows, calls = run(tmp_path)
    out, err = capsys.readouterr()
    names = [r["contender"].split(" of")[0] for r in rows]
    assert names == 2 * ["ours", "course"] + 2 * ["ours", "toy"] + 2 * ["ours", "ours as trained", "toy"]
    assert [r["work"] for r in rows[:4]] == ["step", "step", "forward", "forward"] and len(calls) == 2 * len(rows)
    assert all(float(r["ratio"]) == 1 for r in rows if r["contender"] == "ours")
    assert all(float(r[k]) > 0 for r in rows for k in ("wall", "cpu", "cpu_per_wall", "gflop", "parameters"))
    first, second = ([float(c["wall"]) for c in calls if c["contender"] == name and c["work"] == "step"
                      and c["comparison"] == "course"] for name in ("ours", "course"))
    if torch.get_num_threads() > 1:
        assert float(rows[1]["ratio_most"]) == pytest.approx(max(b / a for a, b in zip(first, second)))
    assert "toy work at side 16, ours at side 8 in patches" in out
    assert len(re.findall(r"^\| (course|default)", out, re.M)) == len(rows)
    assert [line for line in err.splitlines() if "no_such_library" in line] == [
        "(no_such_library can't be imported (No module named 'no_such_library'), so its rows are left out)"]
    assert "Traceback" not in err


def test_compile_adds_a_row(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda net: seen.append(net) or net)
    monkeypatch.setenv("CXX", sys.executable)                        # stands for a compiler
    rows, _ = run(tmp_path, "--only", "course", "--compile")
    assert [r["contender"] for r in rows[:3]] == ["ours", "ours compiled", "course"] and len(seen) == 2


def test_the_course_s_step_learns(tiny):
    class Args:
        device, seed = CPU, 0
    contender = peers.taught(peers.settings(peers.COURSE, Args, False))
    before = [p.clone() for p in contender.network.parameters()]
    contender.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, contender.network.parameters())]
    assert sum(moved) > 0.9 * len(moved) and contender.forward().shape == (2, 3, 16, 16)


@pytest.mark.parametrize("flags", [("--only", "nothing"), ("--rounds", "0")])
def test_wrong_input_is_one_sentence(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        peers.main([*flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(said) == 1 and said[0].endswith(".")


def test_help_names_the_flags(capsys):
    with pytest.raises(SystemExit) as end:
        peers.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and all(f in said for f in ("--only", "--rounds", "--compile", "--out"))
