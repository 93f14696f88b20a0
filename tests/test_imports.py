"""The import picture of the design, made executable: imports go down, and modules, not symbols.

Every file is parsed, none is run. `findings` is a pure function of a file's place and text, so that
the tests below can show that it finds what it should.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "tokgen").rglob("*.py"), *ROOT.glob("train_*.py")])

# The picture, from the ground up; a unit is a file or a folder of tokgen. A file may import what
# lies in a layer below its own, and files of its own folder. A new unit needs a place here.
LAYERS = (
    ("errors",),
    ("storage",),
    ("chips", "choices", "coordination", "flops", "image_grid", "interfaces", "launchers")
    + ("options", "ranges", "records", "rng"),
    ("archives", "boundary", "parameters", "report", "sharding", "losses", "orders", "zoo"),
    ("output", "distributed", "metrics_log", "nn", "metrics"),
    ("runtime", "quantizers", "tokenizers", "generators", "backbones", "sampling"),
    ("discriminators", "config"),
    ("data",),
    ("pretrained",),
    ("checkpoints",),
    ("training",),
    ("planning",),
    ("evaluation",),
    ("samples", "tokens"),
    ("editing", "traces", "image_tokenizer"),
    ("image_generator", "sample_folder"),
    ("image_models",),
    ("app", "demo", "edit_folder"),
    ("commands", "train_tokenizer", "train_generator"),
    ("cli",),
)
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
MODELS = ("nn", "quantizers", "tokenizers", "generators", "backbones", "discriminators")

# What a model knows of devices: a line for the compiler; and for kernels, where they run.
LAID_OUT = ("constrain", "matrix", "by_device", "platform", "counted")

# What the picture forbids and the design wants all the same, with its reason.
EXCEPTIONS = {}

# Symbols that may be imported from a module, with the reason: ("tokgen.module", "Symbol").
SYMBOLS = {
    ("tokgen.pretrained.system", "System"): "what every file of pretrained is a list of",
    ("tokgen.pretrained.system", "Weights"): "a type in every signature of pretrained",
    ("tokgen.zoo.model", "Model"): "what every file of the zoo is a table of",
    ("tokgen.nn.precision", "Precision"): "a type in nearly every signature of nn",
}
# The alphabet itself: its names are the vocabulary of every file.
VOCABULARY = ("tokgen.interfaces", "tokgen.errors")

# Who may import by a name that is computed, which the picture cannot see.
DYNAMIC = {
    "tokgen": "what is asked for of its table of names",
    "tokgen.orders": "the file that a config names",
    "tokgen.cli": "the chosen subcommand",
    "tokgen.config.building": "the file that a config names",
    "tokgen.backbones.features": "every file of its folder",
    "tokgen.backbones.perceptual": "every file of its folder",
    "tokgen.evaluation.metric_table": "every file of metrics",
    "tokgen.pretrained.system": "every file of its folder",
    "tokgen.quantizers.multiscale": "the quantizer that it is given by name",
    "tokgen.zoo.model": "every file of its folder",
}

# Nothing that was read from a file may be executed.
UNSAFE = {
    *("pickle.load", "pickle.loads", "dill.load", "dill.loads", "marshal.load", "marshal.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "joblib.load", "torch.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"),
    *("eval", "exec", "builtins.eval", "builtins.exec"),
}
# Transforms are jax's own; optimizers optax's; a module holds no key.
UNUSED = {
    f"flax.nnx.{name}"
    for name in ("jit", "grad", "value_and_grad", "scan", "vmap", "pmap", "remat", "cond")
} | {"flax.nnx.Optimizer", "flax.nnx.Dropout", "flax.nnx.Module.sow", "flax.nnx.while_loop"}


def module_of(file: pathlib.Path) -> str:
    """The dotted name of a file of the repository."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """`tokgen.nn.conv` is of the unit `nn`; `tokgen` itself of the unit ``."""
    parts = module.split(".")
    return parts[0] if parts[0] != "tokgen" else ".".join(parts[1:2])


def is_module(name: str) -> bool:
    """Whether a dotted name stands for a file or a folder of the repository."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def is_ours(module: str) -> bool:
    """Whether a module is one of the picture's, and not a library's."""
    return module.split(".")[0] == "tokgen" or module in RANK


def imports(tree: ast.AST) -> list[tuple[int, str, str, str | None]]:
    """(line, local name, module, symbol or None) of every import, at any depth of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                found.append((node.lineno, local, alias.name, None))
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                found.append((node.lineno, alias.asname or alias.name, module, alias.name))
    return found


def without_types(tree: ast.Module) -> ast.Module:
    """A file without what only type checkers read."""
    kept = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(kept, tree.type_ignores)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, and an empty text for anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed([*names, node.id])) if isinstance(node, ast.Name) else ""


def used(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, full name) of every name and chain of attributes, import aliases resolved."""
    full = {}
    for _, local, module, symbol in imports(tree):
        if symbol is not None:
            full[local] = f"{module}.{symbol}"
        elif local != module.split(".")[0]:  # import a.b as c
            full[local] = module
    found = []
    for node in ast.walk(tree):
        name = dotted(node)
        if name:
            head, dot, rest = name.partition(".")
            found.append((node.lineno, full.get(head, head) + dot + rest))
    return found


def allowed(importer: str, imported: str) -> bool:
    """Whether one unit may import another."""
    if importer == imported or (importer, imported) in EXCEPTIONS:
        return True
    return RANK[imported] < RANK[importer]


def findings(module: str, text: str) -> list[str]:
    """What is wrong with a file, one line each."""
    tree, unit, wrong = ast.parse(text), unit_of(module), []
    if unit and unit not in RANK:
        wrong.append(f"{module}: {unit!r} has no place in PICTURE of tests/test_imports.py")
    if not unit:  # what a user calls: named for type checkers, imported when it is asked for
        tree = without_types(tree)
    for line, _, source, symbol in imports(tree):
        where = f"{module}:{line}"
        if source.startswith("."):
            wrong.append(f"{where}: relative import; write the full name")
        if not is_ours(source):
            continue
        target = source if symbol is None else f"{source}.{symbol}"
        if symbol is not None and not is_module(target):
            if source not in VOCABULARY and (source, symbol) not in SYMBOLS:
                package, _, last = source.rpartition(".")
                remedy = f"from {package} import {last}, then {last}.{symbol}"
                wrong.append(f"{where}: imports the symbol {target}; write {remedy}")
            target = source
        other = unit_of(target)
        if other in RANK and unit in RANK and not allowed(unit, other):
            wrong.append(f"{where}: {unit} may not import {other}")
        if not unit and other:
            wrong.append(f"{where}: tokgen itself imports nothing of tokgen, found {other}")
    for line, name in used(tree):
        where = f"{module}:{line}"
        if name in UNSAFE:
            wrong.append(f"{where}: {name} may execute what it reads")
        if name in UNUSED:
            wrong.append(f"{where}: {name} is outside the part of NNX that tokgen uses")
        if name in ("importlib.import_module", "__import__") and module not in DYNAMIC:
            wrong.append(f"{where}: {name} hides an import from the picture")
        if unit in MODELS and name.startswith("tokgen.sharding."):
            if name.removeprefix("tokgen.sharding.") not in LAID_OUT:
                wrong.append(f"{where}: {name}; a model lays out what it computes, no more")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and not node.value.value):
                wrong.append(f"{module}:{node.value.lineno}: {node.arg}= must be False")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_keeps_to_the_picture(file):
    assert findings(module_of(file), file.read_text(encoding="utf-8")) == []


def test_every_exception_is_needed_to_be_allowed():
    """An exception that the picture allows anyway would hide a mistake in the table."""
    for pair in EXCEPTIONS:
        assert set(pair) <= set(RANK)
        others = {p: r for p, r in EXCEPTIONS.items() if p != pair}
        importer, imported = pair
        saved = dict(EXCEPTIONS)
        EXCEPTIONS.clear()
        EXCEPTIONS.update(others)
        try:
            assert not allowed(importer, imported)
        finally:
            EXCEPTIONS.clear()
            EXCEPTIONS.update(saved)


def test_no_drawer_for_odds_and_ends():
    names = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
    assert [str(file.relative_to(ROOT)) for file in FILES if file.stem in names] == []


def test_cli_imports_only_the_standard_library_before_a_command_is_chosen():
    tree = ast.parse((ROOT / "tokgen" / "cli.py").read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    heavy = {name for _, _, module, name in imports(top) if module == "tokgen"}
    others = {module.split(".")[0] for _, _, module, _ in imports(top)} - {"__future__", "tokgen"}
    assert others <= sys.stdlib_module_names and heavy <= {
        "choices",
        "coordination",
        "errors",
        "options",
        "runtime",
    }


@pytest.mark.parametrize(
    ("module", "text", "part"),
    [
        ("tokgen.nn.conv", "from tokgen.tokenizers import tokenizer", "nn may not import tok"),
        (
            "tokgen.nn.conv",
            "def f():\n    import tokgen.training.train_state",
            "nn may not import training",
        ),
        ("tokgen.nn.conv", "from tokgen import sampling", "nn may not import sampling"),
        ("tokgen.quantizers.vq", "from tokgen.backbones import vgg", "may not import backbones"),
        ("tokgen.generators.x", "import tokgen.quantizers.vq as q", "may not import quantizers"),
        ("tokgen.losses", "from tokgen.backbones import vgg", "losses may not import backbones"),
        (
            "tokgen.data.pixels",
            "from tokgen.training import stages",
            "data may not import training",
        ),
        (
            "tokgen.training.train_state",
            "from tokgen import evaluation",
            "may not import evaluation",
        ),
        ("tokgen.checkpoints.run", "from tokgen.training import stages", "may not import training"),
        ("tokgen.report", "from tokgen import cli", "report may not import cli"),
        ("tokgen.report", "import train_tokenizer", "report may not import train_tokenizer"),
        (
            "tokgen.config.reading",
            "from train_generator import main",
            "may not import train_generator",
        ),
        ("tokgen.rng", "from tokgen import interfaces", "rng may not import interfaces"),
        ("tokgen", "from tokgen import nn", "tokgen itself imports nothing"),
        ("tokgen.odds", "x = 1", "'odds' has no place"),
        ("tokgen.nn.conv", "from tokgen.nn.linear import Linear", "imports the symbol"),
        ("tokgen.nn.conv", "from . import linear", "relative import"),
        ("tokgen.nn.conv", "import tokgen.sharding as s\ns.make_mesh()", "a model lays out"),
        ("tokgen.report", "import pickle as p\np.load(f)", "pickle.load may execute"),
        ("tokgen.report", "from pickle import loads\nloads(b)", "pickle.loads may execute"),
        ("tokgen.report", "x = eval('1')", "eval may execute"),
        ("tokgen.report", "run = exec", "exec may execute"),
        ("tokgen.report", "import os\nos.system('ls')", "os.system may execute"),
        ("tokgen.report", "import yaml\nyaml.load(f)", "yaml.load may execute"),
        ("tokgen.report", "import subprocess as s\ns.run(c, shell=True)", "shell= must be False"),
        ("tokgen.report", "import numpy as np\nnp.load(f, allow_pickle=x)", "allow_pickle="),
        (
            "tokgen.training.train_state",
            "from flax import nnx\nf = nnx.jit(g)",
            "flax.nnx.jit is outside",
        ),
        (
            "tokgen.training.train_state",
            "import flax\nf = flax.nnx.scan",
            "flax.nnx.scan is outside",
        ),
        ("tokgen.nn.conv", "from flax.nnx import Dropout\nDropout()", "flax.nnx.Dropout is"),
        ("tokgen.report", "import importlib\nimportlib.import_module(n)", "hides an import"),
    ],
)
def test_breach_is_found(module, text, part):
    found = findings(module, text)
    assert len(found) >= 1 and any(part in line for line in found), found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("tokgen.nn.conv", "from tokgen import interfaces, rng\nfrom tokgen.nn import attention"),
        ("tokgen.nn.conv", "from tokgen import sharding\nsharding.constrain(x, 'BLD')"),
        ("tokgen.generators.x", "from tokgen.nn import embeddings\nfrom tokgen import rng"),
        ("tokgen.losses", "from tokgen.interfaces import Array"),
        ("tokgen.checkpoints.checkpoint", "from tokgen import config, parameters"),
        ("tokgen.commands.demo", "from tokgen.demo import families\nfrom tokgen import parameters"),
        ("tokgen.cli", "import importlib\nimportlib.import_module(f'tokgen.commands.{n}')"),
        ("tokgen.report", "import yaml\nyaml.safe_load(f)\nregex.exec(x)\nmodel.eval()"),
        ("tokgen.training.train_state", "from flax import nnx\nnnx.split(m)\nnnx.eval_shape(f)"),
        ("tokgen.report", "np.load(f, allow_pickle=False)\nrun(c, shell=False)"),
    ],
)
def test_what_is_allowed_is_not_found(module, text):
    assert findings(module, text) == []
