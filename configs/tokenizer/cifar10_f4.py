"""Small photographs: 8 x 8 tokens of 32 x 32 pixels, stride 4, 1,000 codes.

    python train_tokenizer.py --config configs/tokenizer/cifar10_f4.py --workdir runs/cifar10_f4 \\
        --config.data.path=DIR

DIR is an image folder: class folders, or `train` and `test` folders of these. Made for CIFAR-10 and
for 20 minutes of CPU; for larger images change `view.size` and add widths. FSQ 8 x 5 x 5 x 5
(arXiv:2309.15505) needs no codebook loss and uses all its codes. Variants: `vq`, `ema` (learned
codebooks of 1,024), `gan` (a PatchGAN discriminator for the second half), `pyramid` (residual
tokens on grids of 1, 2, 4 and 8 with one codebook of 512, for next-scale generators;
arXiv:2404.02905).

| variant | devices | mesh, strategy | a device holds | a step at least |
|---|---|---|---|---|
| | h100:1 | 1,1,1 data | 24.93 MB | 0.00744 ms |
"""

from tokgen.config import reading


def get_config(variant=""):
    """`variant` is "", "vq", "ema", "gan" or "pyramid"; what is not said here is shapes.py's."""
    if variant not in ("", "vq", "ema", "gan", "pyramid"):
        raise ValueError("variants are vq, ema, gan and pyramid")
    like = f":{variant}" if variant in ("vq", "ema", "pyramid") else ""
    config = reading.shipped(f"configs/tokenizer/shapes.py{like}")
    config.steps = 10_000 if variant == "pyramid" else 20_000
    config.data = dict(name="folder", path="", held_out=0.02)
    config.view = dict(size=(32, 32), channels=3, crop="center", zoom=1.25, flip=True)
    config.encoder.update(widths=(128,), variant="light")
    config.decoder.widths = (128,)
    if variant in ("vq", "ema"):
        config.quantizer.codes = 1024
    elif variant == "pyramid":
        config.quantizer.quantizer.codes = 512
    else:
        config.quantizer.levels = (8, 5, 5, 5)
    if variant == "gan":
        config.discriminator.weight = 0.1
    config.optimizer.update(learning_rate=2e-3, warmup=100)
    config.ema = 0.999
    config.held_out.images = 1000
    config.report.save = 5000
    return config
