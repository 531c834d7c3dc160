"""In which order the engine's features may be added to a model: one table.

A feature that is not in the table (LoRAs, tiles, precomputed modulation) may come at any time.
"""

from torch import nn

from ..flux import Flux

# Feature -> the features that may not be there before it, itself included where it is added once at
# most.
NOT_AFTER = {
    "quantized": ("offloaded", "distributed"),
    "compiled": ("compiled", "distributed"),
    "cached": ("cached", "distributed"),
    "offloaded": ("offloaded", "distributed"),
    "distributed": ("distributed",),
}


def features_of(network: nn.Module) -> tuple[str, ...]:
    """The features of a transformer, in the order in which they were added."""
    return getattr(network, "features", ())


def mark(network: nn.Module, feature: str) -> None:
    """Note on a transformer that it has this feature; copies of it have it too."""
    network.features = (*features_of(network), feature)


def check_order(flux: Flux, feature: str) -> None:
    """Raise ValueError where this feature may not be added any more."""
    for other in NOT_AFTER[feature]:
        if other in features_of(flux.mmdit):
            raise ValueError(f"this model is {other} already, and then cannot be {feature}: "
                             "use the model as it was before")
