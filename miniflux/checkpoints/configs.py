"""The small JSON files of a model's folder -> our configs.

Every key that changes a number in the reference libraries is either read, or *fixed*: a file with
another value is refused by name. The rest is listed as harmless, with the reason; a test walks the
keys of the reference classes, so that a new one is noticed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ..flux import Schedule
from .building import check_class, pick
from .formats import read_json


@dataclass(frozen=True)
class Keys:
    """What becomes of the keys of a reference class's config."""

    read: tuple[str, ...]                # taken over
    fixed: dict[str, object]             # refused with any other value
    harmless: dict[str, str]             # key -> why no number here depends on it


def check_fixed(values: dict, fixed: dict, source: Path) -> None:
    """Refuses a config whose value of a fixed key is another one; a key may be absent."""
    for key, expected in fixed.items():
        if (found := values.get(key, expected)) != expected:
            raise ValueError(f"{source}: {key} is {found!r:.60}, expected {expected!r}")


# ----------------------------------------------------------------------------------- the scheduler

SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential",
            "use_beta_sigmas": "beta"}
SCHEDULER = Keys(
    read=("use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len",
          "max_image_seq_len", "time_shift_type", "shift_terminal", *SPACINGS),
    # The last three are no arguments of the class, but the pipelines and the spacings read them.
    fixed={"num_train_timesteps": 1000, "invert_sigmas": False, "stochastic_sampling": False,
           "use_flow_sigmas": False, "sigma_min": None, "sigma_max": None},
    harmless={})
SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"


def read_schedule(path: Path) -> Schedule:
    """The schedule of a scheduler_config.json."""
    values = read_json(path)
    check_class(values, (SCHEDULER_CLASS,), path)
    check_fixed(values, SCHEDULER.fixed, path)
    # Note: the class's own default is a fixed shift.
    values = {"use_dynamic_shifting": False} | values
    names = {key: key for key in SCHEDULER.read if key not in SPACINGS}
    kind = values.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"{path}: time_shift_type is {kind!r:.60}, expected 'exponential' or 'linear'")
    settings = pick(Schedule, values, names, path)
    if settings.base_image_seq_len == settings.max_image_seq_len:
        raise ValueError(f"{path}: base_image_seq_len and max_image_seq_len are both "
                         f"{settings.max_image_seq_len}, expected two sizes")
    if settings.shift_terminal is not None and settings.shift_terminal >= 1:
        raise ValueError(f"{path}: shift_terminal is {settings.shift_terminal}, expected a time below 1")
    spacings = [spacing for key, spacing in SPACINGS.items() if values.get(key)]
    if len(spacings) > 1:
        raise ValueError(f"{path} asks for the spacings {' and '.join(spacings)}, expected one")
    return replace(settings, spacing=spacings[0]) if spacings else settings
