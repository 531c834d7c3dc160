"""The world of the tiny FLUX: scenes of emoji, their captions, edits, depths."""
