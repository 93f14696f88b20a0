"""The table of published models: names, and figures that are those of the networks themselves."""

import functools
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from tests import recipes
from tokgen import rng
from tokgen.config import building, reading as configs
from tokgen.errors import UserError
from tokgen.interfaces import TokenLayout
from tokgen.pretrained import keymap, system as systems, transfer
from tokgen.zoo import model as zoo

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What an import must come to: the recipe of a published size
SIZES = {
    "llamagen-tokenizer-f8": "tokenizer/llamagen_vq:vq8",
    "maskgit-vqgan": "tokenizer/maskgit_vqgan:256",
    "openmagvit2-tokenizer": "tokenizer/openmagvit2:in256",
    "openmagvit2-tokenizer-128": "tokenizer/openmagvit2:in128",
    "var-d36": "generator/var:d36s",
    "var-tokenizer": "tokenizer/var_vqvae:256",
}
FORMS = (
    (r"ibq-tokenizer-(?:pretrain-)?(\d+)", r"tokenizer/ibq:\1"),
    (r"llamagen-(t2i)-(\d+)", r"generator/llamagen:\1_xl_\2"),
    (r"llamagen-(b|l)-384", r"generator/llamagen:\g<1>384"),
    (r"llamagen-(xl|xxl|3b)", r"generator/llamagen:\g<1>384"),
    (r"llamagen-tokenizer.*", r"tokenizer/llamagen_vq:vq16"),
    (r"maskbit-tokenizer-(\d+)bit", r"tokenizer/maskbit:lfq\1"),
    (r"maskgit-tokenizer-(\d+)", r"tokenizer/maskgit_vqgan:\1"),
    (r"openmagvit2-tokenizer-(pretrain)-(\d+)", r"tokenizer/openmagvit2:\1_\2"),
    (r"tatitok-tokenizer-(\w+)-(\w+)", r"tokenizer/tatitok:\1_\2"),
    (r"titok-tokenizer-(\w+)-vq", r"tokenizer/titok_onestage:\1_vq8k"),
    (r"titok-tokenizer-(\w+)-vae", r"tokenizer/titok_onestage:\1_vae_c16"),
    (r"titok-tokenizer-(\w+)", r"tokenizer/titok:\1"),
    (r"var-tokenizer-(\d+)", r"tokenizer/var_vqvae:\1"),
    (r"vqgan-(\d+)", r"tokenizer/taming_vqgan:f16_\1"),
    (r"vqgan-plus-(\d+bit)", r"tokenizer/vqgan_plus:\1"),
    (r"(\w+)-([a-z\d]+)", r"generator/\1:\2"),
)
MODELS = zoo.known()
# Lightning's tokenizers have the averages too, generators their tokenizer
COPIES = {"openmagvit2": 2, "ibq": 2}
WITHIN = ("openmagvit2_generator", "ibq_generator")
# One row of every system is built whenever tests run, the others, and the deepest, in the long ones
FIRST = {model.system: name for name, model in reversed(MODELS.items())}
FIRST |= {"ibq": "", "openmagvit2": ""}
ROWS = [
    pytest.param(name, marks=() if FIRST[model.system] == name else pytest.mark.long)
    for name, model in MODELS.items()
]


def recipe(name: str) -> str:
    if name in SIZES:
        return SIZES[name]
    return next(m.expand(to) for form, to in FORMS if (m := re.fullmatch(form, name)))


def published(model: zoo.Model, module: nnx.Module) -> dict[str, np.ndarray]:
    """The arrays of the published file, without their numbers."""
    system, arrays = systems.named(model.system), {}
    shapes = {path: leaf.shape for path, leaf in keymap._flat(module).items()}
    for row in system.rows(module):
        parts = [
            np.broadcast_to(np.int8(0), shapes[p] if isinstance(p, str) else shapes[p[0]][1:])
            for p in row.places
        ]
        shape = row.rule.published(parts).shape
        arrays[row.key] = np.broadcast_to(np.float32(0), shape)
    return arrays | (system.derived(module) if system.derived else {})


@functools.cache
def built(name: str) -> tuple[dict[str, np.ndarray], nnx.Module, nnx.Module]:
    """(arrays of the published file, the network of its recipe, what an import would build)."""
    model = MODELS[name]
    theirs = recipes.abstract(recipe(name))
    arrays, system = published(model, theirs), systems.named(model.system)
    config, layout, classes = transfer.sizes(
        arrays, system, model.system, dict(model.configuration), source=model.file
    )
    configs.override(config, model.overrides)
    if layout is None:
        return arrays, theirs, nnx.eval_shape(lambda: building.tokenizer(config, rngs=rng.rngs(0)))
    assert classes == (1000 if model.classes else 0)
    assert not model.text or model.text.endswith("{} x {}".format(*config.generator.texts))
    return (
        arrays,
        theirs,
        nnx.eval_shape(lambda: building.generator(config, layout, classes, rngs=rng.rngs(0))),
    )


@pytest.mark.parametrize("name", ROWS)
def test_figures_are_those_of_the_network(name):
    """Parameters, bytes of the file, tokens; an import finds the sizes of the recipe by itself."""
    model = MODELS[name]
    arrays, theirs, ours = built(name)
    assert transfer.parameters(ours) == model.parameters
    shapes = [{k: v.shape for k, v in keymap._flat(m).items()} for m in (theirs, ours)]
    assert shapes[0] == shapes[1]
    size = sum(array.nbytes for array in arrays.values()) * COPIES.get(model.system, 1)
    if model.system in WITHIN:
        tokenizer = MODELS[model.tokenizer]
        size += tokenizer.size // COPIES[tokenizer.system]
    # names and offsets of the arrays; taming's files hold the state of optimizers
    assert size <= model.size and (model.size < 1.0003 * size or model.family == "VQGAN")
    if model.kind == "generator":
        assert ours.layout == theirs.layout == recipes.GENERATORS[recipe(name)][0]
    elif ours.layout is not None:  # a continuous bottleneck has none
        assert ours.layout == layout_of(name)


def layout_of(name: str) -> TokenLayout:
    """What the tokenizer of a row writes, without its networks."""
    config = recipes.load(recipe(name), MODELS[name].overrides)
    encoder = dict(building.plain(config.encoder), size=tuple(config.view.size))
    grid = building.named(config.encoder, "encoder").grid(
        **{key: value for key, value in encoder.items() if key != "name"}
    )
    make = functools.partial(building.build, config.quantizer, "quantizer", grid=grid)
    return nnx.eval_shape(lambda: make(rngs=rng.rngs(0))).layout


@pytest.mark.parametrize("name", [name for name, m in MODELS.items() if m.kind == "generator"])
def test_a_tokenizer_writes_what_its_generator_reads(name):
    model = MODELS[name]
    tokenizer = MODELS[model.tokenizer]
    assert tokenizer.kind == "tokenizer" and tokenizer.pixels == model.pixels
    layout, _, parameters = recipes.GENERATORS[recipe(name)]
    assert layout_of(model.tokenizer) == layout
    assert model.parameters == parameters


def test_every_published_system_has_a_row():
    """But the one that nobody published, and each can be imported."""
    importable = systems.importable()
    named = {m.system for m in MODELS.values()} | {m.otherwise for m in MODELS.values()} - {""}
    assert set(importable) - named == {"maskbit_bert"} and named <= set(importable)
    for name, model in MODELS.items():
        assert (importable[model.system].tokens is not None) == (model.kind == "generator"), name
        assert model.unknown in ("refuse", "opaque") and model.classes in ("imagenet", "")
        assert not (model.classes and (model.text or model.kind == "tokenizer"))
        assert model.classes or model.text or model.kind == "tokenizer"


def test_names_are_plain():
    assert len(MODELS) == 83
    for name, model in MODELS.items():
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name)
        assert bool(model.repository) != bool(model.address)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repository) or model.address[:8] == "https://"
        assert re.fullmatch(r"[\w.-]+", model.file) and re.fullmatch(
            r"arXiv:\d{4}\.\d{5}", model.paper
        )
        assert model.licence in (
            "MIT",
            "MIT (code)",
            "Apache-2.0",
            "Apache-2.0 (code)",
            "not stated",
        )
        assert model.fid is None or 0 < model.fid < 10
        assert zoo.named(name) is model and zoo.is_name(name)
    # the same file twice is the same bytes
    sizes = {(m.home, m.file): set() for m in MODELS.values()}
    for model in MODELS.values():
        sizes[model.home, model.file].add((model.size, model.parameters, model.licence))
    assert all(len(found) == 1 for found in sizes.values())


def test_a_path_that_exists_is_that_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert zoo.is_name("rar-b") and not zoo.is_name("rar-c") and not zoo.is_name(tmp_path)
    (tmp_path / "rar-b").mkdir()
    assert not zoo.is_name("rar-b")
    for name, near in (
        ("rar-xll", "rar-xl or rar-xxl"),
        ("RAR-B", "rar-b or"),
        ("x" * 9999, "xxx"),
    ):
        with pytest.raises(UserError, match=near) as refused:
            zoo.named(name)
        assert len(str(refused.value)) < 250 and "83 in all" in str(refused.value)


def test_the_table_needs_no_jax():
    code = (
        "import sys; from tokgen.zoo import model; model.known();"
        "print(*{'jax', 'flax', 'numpy', 'ml_collections'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ""


def expanded(text: str) -> list[str]:
    """`a-{b,c}` as a shell expands it; every group takes its words in step."""
    groups = [group.split(",") for group in re.findall(r"\{([^}]*)\}", text)]
    count = max(map(len, groups), default=1)
    assert all(len(group) == count for group in groups), text
    parts = re.split(r"\{[^}]*\}", text)
    return [
        "".join(part + (groups[n][k] if n < len(groups) else "") for n, part in enumerate(parts))
        for k in range(count)
    ]


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_documents_have_the_table(kind):
    """Every row, its name, system, file, place and licence, and nothing else."""
    text = (ROOT / "docs" / f"{kind}s.md").read_text(encoding="utf-8")
    told = {}
    for line in text.split("| name | `--system` |")[1].split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
        names = expanded(cells[0])
        others = [expanded(cell) for cell in cells[1:]]
        assert all(len(cell) in (1, len(names)) for cell in others), line
        for number, name in enumerate(names):
            assert name not in told
            told[name] = [cell[number if len(cell) > 1 else 0] for cell in others]
    wanted = {}
    for name, model in MODELS.items():
        if model.kind == kind:
            systems_ = " or ".join(one for one in (model.system, model.otherwise) if one)
            place = model.home.removeprefix("https://").removesuffix(f"/{model.file}").strip("/")
            wanted[name] = [systems_, model.file, place, model.licence]
    assert told == wanted
