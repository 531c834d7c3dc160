"""The console command: `miniflux NAME ...` runs `python -m miniflux.MODULE ...`.

    miniflux generate "a fox next to a red apple" --seed 7
    miniflux --help
"""

import difflib
import runpy
import sys

from .command import command, say

# What is typed -> the module that is run, and one line about it.
COMMANDS = {
    "generate": ("generate", "paint an image from text"),
    "image_to_image": ("image_to_image", "repaint an image after a prompt"),
    "inpaint": ("inpaint", "repaint the white part of a mask with any model"),
    "fill": ("fill", "the same with a Fill model, also beyond the image's edges"),
    "control": ("control", "paint along edges or depths with a Canny or Depth model"),
    "redux": ("redux", "paint variations of an image"),
    "kontext_edit": ("kontext_edit", "change an image by an instruction"),
    "kontext_inpaint": ("kontext_inpaint", "change the white part of a mask by an instruction"),
    "canny": ("imaging.canny", "find the edges of an image"),
    "depth": ("imaging.depth", "estimate the depths of an image"),
    "info": ("imaging.info", "show how an image was made"),
    "preview": ("imaging.preview", "fit the linear map that previews latents"),
    "lora": ("adapters.lora", "list what LoRA files hold"),
    "plan": ("plan", "list the ways of running a model that fit in memory"),
    "native": ("networks.native", "show which compiled kernels are in use"),
    "bench": ("bench", "measure speed and memory, beside diffusers"),
    "tiny words": ("tiny.world.listing", "list the words of the small models' world"),
    "tiny scenes": ("tiny.world.sheet", "draw scenes of it"),
    "tiny train": ("tiny.train", "train the small models"),
    "tiny evaluate": ("tiny.measure.evaluate", "measure a small model on held-out combinations"),
    "tiny evaluate_variant": ("tiny.measure.evaluate_variant", "measure a variant of it"),
    "tiny gallery": ("tiny.measure.gallery", "paint the sheet of all small models"),
    "tiny export": ("tiny.export", "write a shipped model as a whole folder"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    first, last = "usage: miniflux COMMAND ...", "miniflux COMMAND --help lists its flags."
    return "\n".join([first, "", *lines, "", last])


@command
def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        say(usage())
        return
    if words[0] == "--version":
        from . import __version__
        say(__version__)
        return
    length = 2 if words[0] == "tiny" else 1
    name = " ".join(words[:length]).replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "miniflux --help lists the commands"
        print(f"miniflux: there is no command {name!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = words[length:]
    runpy.run_module(f"miniflux.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
