"""What the configs of generators are made for, what configs build, and checkpoints of it."""

import pathlib

import jax
from flax import nnx

from tokgen import parameters, rng, sharding
from tokgen.checkpoints import checkpoint, loading, run as runs
from tokgen.config import building, reading as configs
from tokgen.data import shapes
from tokgen.interfaces import TokenLayout
from tokgen.quantizers import multiscale
from tokgen.training import optimizer as optimizers, train_state


def square(side: int, *vocab: int) -> TokenLayout:
    """A grid of tokens."""
    return TokenLayout(vocab, ((side, side),))


def line(length: int, *vocab: int) -> TokenLayout:
    """A row of tokens."""
    return TokenLayout(vocab, ((1, length),))


def pyramid(sides: tuple[int, ...], *vocab: int) -> TokenLayout:
    """Grids of tokens, coarse to fine."""
    return TokenLayout(vocab, tuple((side, side) for side in sides))


SMALL = (1, 2, 4, 8)
CODES, HALVES, VAR = square(16, 16384), square(16, 64, 4096), pyramid(multiscale.VAR_256, 4096)

# Config and variant -> layout, classes, parameters. By hand, generator/shapes: a layer
# 2*128 + 4*128*128 + 3*128*352, four of them; 240*128 symbols, 11*128 labels, a head of
# 128 + 128*240. The published counts are derived beside the systems' tests.
GENERATORS = {
    "generator/cifar10": (square(8, 1000), 10, 1_061_376),
    "generator/cifar10:columns": (square(8, 1000), 10, 1_061_376),
    "generator/cifar10:masked": (square(8, 1000), 10, 1_069_824),
    "generator/cifar10:next_scale": (pyramid(SMALL, 512), 10, 1_301_008),
    "generator/cifar10:random": (square(8, 1000), 10, 1_077_888),
    "generator/cifar10:raster": (square(8, 1000), 10, 1_061_376),
    "generator/cifar10:sequence": (square(8, 1000), 10, 1_069_696),
    "generator/shapes": (square(8, 240), 10, 866_816),
    "generator/shapes:masked": (square(8, 240), 10, 875_264),
    "generator/shapes:next_scale": (pyramid(SMALL, 256), 10, 1_267_984),
    "generator/shapes:random": (square(8, 240), 10, 883_328),
    "generator/shapes:raster": (square(8, 240), 10, 866_816),
    "generator/ibq": (CODES, 1000, 342_994_944),
    "generator/ibq:b": (CODES, 1000, 342_994_944),
    "generator/ibq:l": (CODES, 1000, 649_640_960),
    "generator/ibq:xl": (CODES, 1000, 1_076_103_168),
    "generator/ibq:xxl": (CODES, 1000, 2_063_331_840),
    "generator/llamagen": (CODES, 1000, 110_888_448),
    "generator/llamagen:b": (CODES, 1000, 110_888_448),
    "generator/llamagen:l": (CODES, 1000, 342_910_976),
    "generator/llamagen:xl": (CODES, 1000, 774_699_520),
    "generator/llamagen:xxl": (CODES, 1000, 1_410_972_672),
    "generator/llamagen:3b": (CODES, 1000, 3_096_659_200),
    "generator/llamagen:b384": (square(24, 16384), 1000, 110_888_448),
    "generator/llamagen:l384": (square(24, 16384), 1000, 342_910_976),
    "generator/llamagen:xl384": (square(24, 16384), 1000, 774_699_520),
    "generator/llamagen:xxl384": (square(24, 16384), 1000, 1_410_972_672),
    "generator/llamagen:3b384": (square(24, 16384), 1000, 3_096_659_200),
    "generator/llamagen:t2i_xl_256": (CODES, 0, 777_678_080),
    "generator/llamagen:t2i_xl_512": (square(32, 16384), 0, 777_678_080),
    "generator/maskbit": (square(16, 128, 128), 1000, 304_929_024),
    "generator/maskbit:10bit": (square(16, 32, 32), 1000, 304_728_128),
    "generator/maskbit:12bit": (square(16, 64, 64), 1000, 304_795_776),
    "generator/maskbit:14bit": (square(16, 128, 128), 1000, 304_929_024),
    "generator/maskbit:16bit": (square(16, 256, 256), 1000, 305_193_472),
    "generator/maskbit:18bit": (square(16, 512, 512), 1000, 305_720_320),
    "generator/maskbit:tokens": (square(16, 128, 128), 1000, 304_980_992),
    "generator/maskgit": (square(16, 1024), 1000, 172_457_193),
    "generator/maskgit:256": (square(16, 1024), 1000, 172_457_193),
    "generator/maskgit:512": (square(32, 1024), 1000, 173_047_017),
    "generator/npp": (CODES, 1000, 110_888_448),
    "generator/npp:b": (CODES, 1000, 110_888_448),
    "generator/npp:l": (CODES, 1000, 342_910_976),
    "generator/npp:xl": (CODES, 1000, 774_699_520),
    "generator/npp:xxl": (CODES, 1000, 1_410_972_672),
    "generator/openmagvit2": (HALVES, 1000, 343_570_432 + 2 * 4032 * 1024),
    "generator/openmagvit2:b": (HALVES, 1000, 343_570_432 + 2 * 4032 * 1024),
    "generator/openmagvit2:l": (HALVES, 1000, 804_362_240 + 2 * 4032 * 1280),
    "generator/openmagvit2:xl": (HALVES, 1000, 1_486_679_040 + 2 * 4032 * 1536),
    "generator/rar": (square(16, 1024), 1000, 260_923_648),
    "generator/rar:b": (square(16, 1024), 1000, 260_923_648),
    "generator/rar:l": (square(16, 1024), 1000, 461_668_352),
    "generator/rar:xl": (square(16, 1024), 1000, 955_425_024),
    "generator/rar:xxl": (square(16, 1024), 1000, 1_498_520_704),
    "generator/titok": (line(32, 4096), 1000, 177_202_432),
    "generator/titok:b64": (line(64, 4096), 1000, 177_227_008),
    "generator/titok:l32": (line(32, 4096), 1000, 177_202_432),
    "generator/titok:s128": (line(128, 4096), 1000, 294_990_848),
    "generator/var": (VAR, 1000, 310_283_520),
    "generator/var:d16": (VAR, 1000, 310_283_520),
    "generator/var:d20": (VAR, 1000, 600_917_136),
    "generator/var:d24": (VAR, 1000, 1_033_399_360),
    "generator/var:d30": (VAR, 1000, 2_010_020_356),
    "generator/var:d36s": (pyramid(multiscale.VAR_512, 4096), 1000, 2_353_893_904),
}


def load(reference: str, overrides=()):
    """The config of "generator/file" or "generator/file:variant"."""
    name, colon, variant = reference.partition(":")
    return configs.load(f"configs/{name}.py{colon}{variant}", overrides)


def abstract(reference: str) -> nnx.Module:
    """What a config builds, of a generator for its own tokens, without its numbers.

    Built once where several configs, or several tests, ask for the same networks: do not change it.
    """
    settings = load(reference)
    kind = reference.partition("/")[0]
    stated = building.plain(settings)
    asked = [stated.get(section) for section in SECTIONS[kind]]
    own = GENERATORS[reference][:2] if kind == "generator" else ()
    key = repr((asked, own))
    if key not in _built:
        make = getattr(building, kind)
        _built[key] = nnx.eval_shape(lambda: make(settings, *own, rngs=rng.rngs(0)))
    return _built[key]


SECTIONS = {
    "tokenizer": ("encoder", "quantizer", "decoder", "view", "pixels", "precision"),
    "generator": ("generator", "precision"),
}
_built: dict[str, nnx.Module] = {}


def tiny(folder: pathlib.Path, *families: str, channels: int = 3) -> None:
    """`runs/tokenizer` below a folder, and `runs/FAMILY` of generators, tiny, of random numbers.

    The first of the families, of configs/generator/shapes.py, lies in `runs/generator`. Each has a
    preset `half`, in bfloat16. The tokenizer of `next_scale` lies in `runs/pyramid`. Images of one
    channel are gray.
    """
    names = tuple(shapes.Source().classes)
    tokenizers = {"": tiny_tokenizer(folder / "runs" / "tokenizer", "", names, channels)}
    for number, family in enumerate(families):
        form = ":pyramid" if family == "next_scale" else ""
        if form not in tokenizers:
            tokenizers[form] = tiny_tokenizer(folder / "runs" / "pyramid", form, names, channels)
        loaded = tokenizers[form]
        settings = load(f"generator/shapes:{family}", ["generator.width=16", "generator.depth=1"])
        settings.presets.half = dict(settings.presets.default, precision="bfloat16")
        workdir = folder / "runs" / (family if number else "generator")
        save(
            workdir,
            settings,
            lambda settings=settings, layout=loaded.layout: scattered(
                building.generator(settings, layout, 10, rngs=nnx.Rngs(0))
            ),
            kind="generator",
            layout=loaded.layout,
            best="nats_per_token",
            classes=names,
            tokenizer=checkpoint.reference(loaded.step, workdir)
            | {"fingerprint": loaded.fingerprint},
        )


def tiny_tokenizer(
    workdir: pathlib.Path,
    form: str,
    names: tuple[str, ...],
    channels: int = 3,
    compute: str = "float32",
) -> loading.Loaded:
    """A tiny tokenizer of random numbers, of a form of configs/tokenizer/shapes.py."""
    narrow = ["encoder.widths=(16,)", "decoder.widths=(16,)", "encoder.blocks=1"]
    narrow += [f"data.channels={channels}", f"view.channels={channels}"]
    narrow += [f"precision.compute={compute}"]
    tokenizer = load(f"tokenizer/shapes{form}", narrow)
    save(
        workdir,
        tokenizer,
        lambda: building.tokenizer(tokenizer, rngs=nnx.Rngs(0)),
        kind="tokenizer",
        layout=nnx.eval_shape(lambda: building.tokenizer(tokenizer, rngs=nnx.Rngs(0))).layout,
        best="l2",
        classes=names,
    )
    return loading.load_tokenizer(workdir)


def scattered(module: nnx.Module) -> nnx.Module:
    """A network with noise on every parameter: new ones begin with heads that say nothing."""
    graph, params, stats = parameters.split(module)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return parameters.merge(graph, jax.tree.unflatten(tree, noisy), stats)


def save(workdir: pathlib.Path, settings, make, *, best: str, **meta) -> None:
    """A work directory with a checkpoint of step 0."""
    optimizer = optimizers.optimizer(steps=1, learning_rate=1e-3)
    # of one device: eight of them are written one by one
    _, network = train_state.create(make, optimizer, mesh=sharding.single())
    classes = tuple(f"shape{number}" for number in range(10))
    meta = {"classes": classes} | meta
    run = runs.start(workdir, settings, best=best, data="", **meta)
    run.save({"model": network}, {best: 1.0})
    run.close()
