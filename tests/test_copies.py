"""The scripts repeat code on purpose, so that each can be read and copied alone. This keeps the repeats honest.

A repeated block starts with `# === NAME ===` and ends with `# === end NAME ===`. BLOCKS says which scripts
hold it; the first is the origin, whose text the others repeat to the letter, comments included. Lines that a
script must have for itself end in its tag, such as `# cfg`, and stand in for as many of the origin's, or fewer.

    pytest tests/test_copies.py            # check
    python tests/test_copies.py --fix      # copy the origin over the others, lines of their own left alone
"""
import argparse
import ast
import difflib
import importlib
import inspect
import io
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TRACKED = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.name in TRACKED or not TRACKED)

TRAINING = ["ddpm_afhq", "ddim_afhq", "cfg_afhq"]
PAINTING = ["inpaint_afhq", "mcg_inpaint"]
TOYS = ["toy_sde", "toy_dpm_solver"]
BLOCKS = {
    "schedule":       TRAINING + PAINTING,
    "unet":           TRAINING + PAINTING,
    "train":          TRAINING,
    "training flags": TRAINING,
    "walk":           PAINTING,
    "trunk":          TOYS,
}

# Names that stand in two scripts or more, in no block, because each has its own.
SKELETON = {"schedule", "loss", "sample", "train", "parse_args", "main"}     # the shape of every script
DIFFER = {
    "guided": "the guidance formula for two batches in one call, and for points",
    "divergence": "by random vectors, or exact",
    "Block": "fid: of its classifier; elsewhere a block",
    "load": "fid: a feature network; common: the weights of a checkpoint",
    "points": "schrodinger_bridge: two Gaussians more than common has",
    "prepare": "fid: pictures as a network wants them; common: flags as a script wants them",
    "report": "fid: what it prints; common: a table of means over seeds",
    "schedule": "alpha_bar, an SDE's kernel or a bridge's reference",
}

# The same statements under comments that cite another paper's numbers.
SAME = [("loss", "ddpm_afhq", "ddim_afhq")]

# Changed lines outside the module's docstring, that the reader of B after A has to read.
BUDGET = {
    ("ddpm_afhq", "ddim_afhq"): 60,
    ("ddim_afhq", "cfg_afhq"): 240,
    ("ddpm_afhq", "inpaint_afhq"): 180,
    ("inpaint_afhq", "mcg_inpaint"): 180,
}

# Tokens of code, docstrings and comments not counted: what a reader reads.
TOKENS = {"ddpm_afhq": 3200, "ddim_afhq": 3100, "cfg_afhq": 4000, "inpaint_afhq": 2900, "mcg_inpaint": 3600, "toy_sde": 4300,
          "toy_dpm_solver": 4000, "schrodinger_bridge": 3900, "fid": 3600}


def source(script):
    return (ROOT / f"{script}.py").read_text(encoding="utf-8")


def marks(text):
    return re.findall(r"^ *# === (?!end )(.+) ===$", text, re.M)


def block(text, name):
    """The lines of one block; ValueError when it is absent, there twice, or not closed."""
    found = re.findall(rf"^ *# === {name} ===\n(.*?)^ *# === end {name} ===$", text, re.S | re.M)
    if len(found) != 1 or marks(text).count(name) != 1 or marks(found[0]):
        raise ValueError(f"{len(found)} blocks '{name}', want exactly 1")
    return found[0].splitlines()


def differences(origin, copy, tag):
    """Diff lines that the copy is not allowed: all but lines that end in its own tag."""
    own = re.compile(rf"\S.*  # {tag}$")
    bad = []
    for op, a0, a1, b0, b1 in difflib.SequenceMatcher(None, origin, copy, autojunk=False).get_opcodes():
        tagged = b1 > b0 and all(own.search(line) for line in copy[b0:b1]) and a1 - a0 <= b1 - b0
        if op != "equal" and not tagged:
            bad += [f"-{line}" for line in origin[a0:a1]] + [f"+{line}" for line in copy[b0:b1]]
    return bad


def tag(script):
    return script.split("_")[0]


def body(text):
    """A script's text after the module's docstring."""
    return "".join(text.splitlines(keepends=True)[ast.parse(text).body[0].end_lineno:])


def width(number, line, docstring_ends):
    """Columns that a line may have: a flag stands on one line with its help, a formula on one line of the docstring."""
    return 106 if number <= docstring_ends else 120 if re.match(r"    (add|p\.add_argument)\(\"", line) else 100


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "common"])
def test_lines_can_be_read_side_by_side(script):
    ends = ast.parse(source(script)).body[0].end_lineno
    for number, line in enumerate(source(script).splitlines(), 1):
        assert len(line) <= width(number, line, ends), f"{script}.py:{number} has {len(line)} columns, want {width(number, line, ends)} or fewer"


def tokens(text):
    """Tokens of code: no docstring, no comment, no line end. An f-string is one, as before Python 3.12."""
    docstrings = {node.body[0].lineno for node in ast.walk(ast.parse(text))
                  if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
    start, end = (getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END"))
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth -= token.type == end
        count += depth == 0 and token.type not in skip | {start} and not (token.type == tokenize.STRING and token.start[0] in docstrings)
        depth += token.type == start
    return count


@pytest.mark.parametrize("script", TOKENS)
def test_script_is_no_longer_than_its_budget(script):
    count = tokens(source(script))
    assert count <= TOKENS[script], f"{script}.py has {count} tokens, the budget is {TOKENS[script]}"


def test_tokens_are_counted_alike_by_every_python():
    assert tokens('"""doc"""\n\n\ndef f(a):\n    """Doc,\n    two lines."""\n    # why\n    return f"{a + 1} and {a!r:>{3}} {{}}" + "b"  # why\n') == 10
    assert tokens('x = f"a" f"{b[\'c\']}" "d"\n') == 5


@pytest.mark.parametrize("script", TRAINING)
def test_the_lines_that_learn_are_one_paragraph(script):
    """train is under 45 lines, and from the batch x0 to the average of the weights no line is empty or looks elsewhere."""
    node = next(n for n in ast.parse(source(script)).body if getattr(n, "name", "") == "train")
    lines = source(script).splitlines()[node.lineno - 1:node.end_lineno]
    assert len(lines) < 45, f"{script}.py: train has {len(lines)} lines"
    first, last = (next(i for i, line in enumerate(lines) if word in line) for word in ("next(batches)", "lerp_("))
    learn = lines[first:last + 1]
    assert len(learn) <= 12 and all(line.strip() for line in learn), f"{script}.py: the lines that learn are {len(learn)}"
    assert not re.search(r"\b(run|print|tqdm|save\w*|isfinite|world|rank)\b", " ".join(learn).replace("common.", "")), f"{script}.py: more than learning"
    for word in ("loss(", "zero_grad()", "backward()", "clip_grad_norm_(", ".step()", "lerp_("):
        assert sum(word in line for line in learn) == 1, f"{script}.py: {word} in the lines that learn"


@pytest.mark.parametrize(("name", "script"), [(n, s) for n, scripts in BLOCKS.items() for s in scripts[1:]])
def test_block_repeats_its_origin(name, script):
    origin = BLOCKS[name][0]
    bad = differences(block(source(origin), name), block(source(script), name), tag(script))
    assert not bad, f"{script}.py: block '{name}' is not that of {origin}.py:\n" + "\n".join(bad)


def test_every_mark_is_in_the_table():
    for script in SCRIPTS:
        text = source(script)
        for name in marks(text):
            assert script in BLOCKS.get(name, []), f"{script}.py marks a block '{name}' that BLOCKS doesn't give it"
            block(text, name)
        for name, scripts in BLOCKS.items():
            assert script not in scripts or name in marks(text), f"{script}.py lacks the block '{name}'"


def test_a_definition_in_two_scripts_is_in_a_block_or_meant_to_differ():
    seen = {}
    for script in SCRIPTS:
        text = source(script)
        inside = {node.name for name in marks(text) if len(BLOCKS[name]) > 1
                  for node in ast.parse(textwrap.dedent("\n".join(block(text, name)))).body if hasattr(node, "name")}
        for node in ast.parse(text).body:
            if hasattr(node, "name") and node.name not in inside:
                seen.setdefault(node.name, {})[script] = ast.get_source_segment(text, node)
    for name, where in seen.items():
        both = " and ".join(where)
        assert len(where) == 1 or name in SKELETON or name in DIFFER, f"{name}: in {both}, and in no block"
        same = sum(first == name for first, *_ in SAME)
        assert len(set(where.values())) >= len(where) - same, f"{name}: the same in {both}, so it belongs in a block"


@pytest.mark.parametrize(("name", "a", "b"), SAME)
def test_same_code_under_other_equation_numbers(name, a, b):
    code = []
    for script in (a, b):
        node = next(n for n in ast.parse(source(script)).body if getattr(n, "name", "") == name)
        code.append("\n".join([ast.unparse(node.args), *[ast.unparse(n) for n in node.body[1:]]]))      # without the docstring
    assert code[0] == code[1], "\n".join(difflib.unified_diff(*[c.splitlines() for c in code], a, b, lineterm="", n=0))


def changed(a, b):
    """Lines outside the module's docstring that `diff` prints, nearly: it may find a few more."""
    steps = difflib.SequenceMatcher(None, body(source(a)).splitlines(), body(source(b)).splitlines(), autojunk=False).get_opcodes()
    return sum(a1 - a0 + b1 - b0 for op, a0, a1, b0, b1 in steps if op != "equal")


@pytest.mark.parametrize(("a", "b"), BUDGET)
def test_the_difference_between_two_scripts_stays_small(a, b):
    size = changed(a, b)
    assert size <= BUDGET[a, b], f"diff {a}.py {b}.py: {size} lines, the budget is {BUDGET[a, b]}"


def test_data_and_metrics_hold_no_algorithm():
    """common.py and fid.py: no schedule, no diffusion network, no loss, no sampler, and no flag of one."""
    banned = {"schedule", "sample", "Denoiser", "UNet", "diffuse_to", "guided", "alpha_bar", "beta", "x0_hat", "eps_hat"}
    flags = {"--steps", "--eta", "--scale", "--solver", "--schedule", "--predict", "--weight", "--variance", "--clip",
             "--strength", "--jump", "--repeats", "--known", "--ema", "--method"}
    for script in ("common", "fid"):
        tree = ast.parse(source(script))
        names = {getattr(n, "name", None) or getattr(n, "id", None) or getattr(n, "arg", None) for n in ast.walk(tree)}
        assert not names & banned, f"{script}.py speaks of {sorted(names & banned)}"
        assert not set(parser(script)._option_string_actions) & flags
    assert "loss" not in {n.name for n in ast.parse(source("common")).body if hasattr(n, "name")}
    assert {n.name for n in ast.walk(ast.parse(source("common"))) if isinstance(n, ast.ClassDef)} == {"Parser", "Muon", "Run", "GroupNorm"}


def test_scripts_import_no_other_script():
    allowed = {"common", "fid", "torch", "torchvision", "numpy", "scipy", "matplotlib", "PIL", "tqdm"} | sys.stdlib_module_names
    for script in SCRIPTS:                       # those in bench/ measure the scripts and may import them: nobody copies them
        for node in ast.walk(ast.parse(source(script))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed - {script}, f"{script}.py imports {name}"
    assert "fid" not in source("common").split('"""')[2]


def test_importing_has_no_side_effect(tmp_path, monkeypatch, capfd):
    """Neither statements that do things, nor anything printed, written or drawn from torch's generator."""
    import torch
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path), list(sys.argv)
    for script in SCRIPTS:
        for node in ast.parse(source(script)).body:
            call = ast.unparse(node) if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant) else ""
            assert call in ("", "matplotlib.use('Agg')"), f"{script}.py, line {node.lineno}: {call}"
            assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{script}.py, line {node.lineno}"
        spec = importlib.util.spec_from_file_location(f"fresh_{script}", ROOT / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    after = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path), list(sys.argv)
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- flags and commands

def parser(script):
    """The argparse parser that a script's parse_args builds."""
    kept, real = [], argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, argv=None, namespace=None: kept.append(self) or real(self, [])
    try:
        importlib.import_module(script).parse_args([])
    except SystemExit:       # a script may ask for more than no arguments
        pass
    finally:
        argparse.ArgumentParser.parse_args = real
    return kept[0]


def test_a_flag_means_the_same_everywhere():
    """One type to a flag, whichever script has it; defaults, choices and help may differ, so that each help is true."""
    first, apart = {}, {("toy_sde", "--T")}                     # a time; elsewhere a number of levels
    for script in SCRIPTS:
        for action in parser(script)._actions:
            for flag in action.option_strings:
                if flag.startswith("--") and flag != "--help" and (script, flag) not in apart:
                    assert action.help, f"{script}.py: {flag} has no help"
                    kind = inspect.getclosurevars(action.type).nonlocals["kind"] if inspect.isfunction(action.type) else action.type or str
                    here = type(action).__name__, kind          # int, float, str: the ranges differ
                    origin, there = first.setdefault(flag, (script, here))
                    assert here == there, f"{flag}: {script}.py has {here}, {origin}.py {there}"
    assert len(first) > 40


FLAGS = {      # words that must stand in the help: they settle what the papers and courses say differently
    "--scale": r"0.*1.*\bw\b",                      # 0 and 1 mean what they mean here, and w is the paper's
    "--eta": r"0 none, 1 as much as DDPM",
    "--seed": r"seed of all chance",
    "--ckpt": r"OUT/model.pt if there, else the one in assets/",
    "--schedule": r"noise schedule",
    "--T": r"number of noise levels",
}


def test_flags_that_settle_an_ambiguity():
    for script in SCRIPTS:
        for flag, action in parser(script)._option_string_actions.items():
            if (script, flag) != ("toy_sde", "--T"):            # there it is a time
                assert re.search(FLAGS.get(flag, ""), action.help), f"{script}.py: help of {flag}: {action.help}"


def commands(text):
    """(script, arguments) of every `python SCRIPT.py ...` and `torchrun ... SCRIPT.py ...` in a text.

    A command ends at the line's end, a backtick, a bar, a semicolon, a comment, or where two spaces begin its explanation.
    """
    for found in re.finditer(r"\b(?:python3?|torchrun(?: --\S*)*) ((?:\w+/)?\w+)\.py\b([^\n`|#;]*)", text):
        words = re.split(r"\s{2,}|\s+\(", found[2].rstrip("., "))[0] if found[2].strip() else ""
        yield found[1], shlex.split(words)


BENCH = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text())
TEXTS = ["README.md", "RESULTS.md", "assets/README.md", *BENCH, *[f"{script}.py" for script in SCRIPTS]]


def module(path):
    """The script at a path without its .py, imported; those in bench/ by their place."""
    if "/" not in path:
        return importlib.import_module(path)
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("path", [p for p in TEXTS if (ROOT / p).is_file()])
def test_commands_that_are_shown_can_be_typed(path, capsys):
    text = (ROOT / path).read_text(encoding="utf-8")
    shown = ast.get_docstring(ast.parse(text), clean=False) or "" if path.endswith(".py") else text
    found = list(commands(shown))
    assert found, f"{path} shows no command"
    for script, words in found:
        assert (ROOT / f"{script}.py").is_file(), f"{path} shows {script}.py, which isn't there"
        try:
            module(script).parse_args(words)
        except SystemExit:
            pytest.fail(f"{path}: `python {script}.py {' '.join(words)}` isn't understood: {capsys.readouterr().err}")


def test_commands_finds_commands():
    text = "run `python a.py --n 3`, or\n  python b.py --x 'y z'   a picture\n torchrun --nproc_per_node=2 -- c.py --train # two\npython bench/d.py x; python e.py\n"
    assert list(commands(text)) == [("a", ["--n", "3"]), ("b", ["--x", "y z"]), ("c", ["--train"]), ("bench/d", ["x"]), ("e", [])]


def test_differences_allows_tagged_lines_only():
    origin = ["a = 1", "b = 2", "c = 3"]
    assert differences(origin, origin, "cfg") == []
    assert differences(origin, ["a = 1", "b = 4  # cfg", "d = 5  # cfg", "c = 3"], "cfg") == []
    assert differences(origin, ["a = 1", "b = 4", "c = 3"], "cfg") == ["-b = 2", "+b = 4"]
    assert differences(origin, ["a = 1", "b = 4  # ddim", "c = 3"], "cfg")
    assert differences(origin, ["a = 1", "c = 3"], "cfg") == ["-b = 2"]
    assert differences(origin, ["a = 1", "b = 4  # cfg"], "cfg")                   # c is gone, under cover of a tag
    with pytest.raises(ValueError, match="want exactly 1"):
        block("# === x ===\na = 1\n", "x")


def fix():
    for name, (origin, *rest) in BLOCKS.items():
        for script in rest:
            text, want = source(script), block(source(origin), name)
            lines = block(text, name)
            if not differences(want, lines, tag(script)):
                continue
            if any(line.endswith(f"  # {tag(script)}") for line in lines):
                print(f"{script}.py: has lines of its own in '{name}', merge by hand")
                continue
            head, tail = f"# === {name} ===\n", f"# === end {name} ==="
            before, after = text.split(head)[0], text.split(tail)[1]
            indent = re.search(r" *$", before)[0]
            (ROOT / f"{script}.py").write_text(before + head + "\n".join(want) + "\n" + indent + tail + after, encoding="utf-8")
            print(f"{script}.py: '{name}' copied from {origin}.py")


if __name__ == "__main__" and "--fix" in sys.argv:
    fix()
