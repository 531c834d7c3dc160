"""The table `quantize`: memory, speed and quality of each format."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from ..engine.quantize import FORMATS, quantize
from ..flux import Flux
from ..generate import generate
from ..loading import load
from .measuring import PROMPT, medians

FEW, MANY = 1, 15                      # steps of two runs, whose difference is the time of steps


def bench_quantize(source: str) -> None:
    """The model's step and images, and a product of FLUX.1's width for 1,024 tokens."""
    from ..tiny.measure.evaluate import evaluate, held_out_scenes

    flux = load(source, device="cpu")
    scenes = held_out_scenes(50, 0, ("object",))
    torch.manual_seed(0)
    x = torch.randn(1024, 3072)
    weight = torch.randn(12288, 3072) / 55
    exact_product = x @ weight.t()
    models: dict[str, Flux] = {"float32": flux}
    products: dict[str, Callable] = {"float32": lambda: F.linear(x, weight)}
    for form, (pack, _, kind) in FORMATS.items():
        layer = kind(pack(weight), torch.float32, weight.device)
        error = (layer(x) - exact_product).norm() / exact_product.norm()
        assert error < 0.12, f"{form} is off by {error}"
        models[form] = quantize(flux, form)
        products[form] = partial(layer, x)

    product_times = dict(zip(products, medians(*products.values(), runs=5)))
    calls = []
    for model in models.values():
        for steps in (FEW, MANY):
            calls.append(partial(generate, model, PROMPT, steps=steps, output="latents",
                                 progress=False))
    times = medians(*calls, runs=7)
    step_times = {form: (many - few) / (MANY - FEW)
                  for form, few, many in zip(models, times[::2], times[1::2])}

    exact = generate(flux, PROMPT, output="tensor", progress=False)
    print(f"\n{'format':14} {'transformer':>12} {'a step':>9} {'3072 -> 12288':>15} "
          f"{'difference':>11} {'object right':>13} {'ground':>8}")
    for form, model in models.items():
        tensors = [*model.mmdit.parameters(), *model.mmdit.buffers()]
        size = sum(t.numel() * t.dtype.itemsize for t in tensors)
        image = generate(model, PROMPT, output="tensor", progress=False)
        rates = evaluate(model, scenes).painted
        print(f"{form:14} {size / 2**20:8.1f} MiB {1e3 * step_times[form]:6.1f} ms "
              f"{1e3 * product_times[form]:12.0f} ms {(image - exact).abs().mean():11.4f} "
              f"{rates.object:13.0%} {rates.ground:8.0%}")
