"""What makes `wdanalysis.training.layers` fast, and nothing else: without it they train the same, only slower.

`accelerate` is called in one place, where layers are put into a model (`wdanalysis.training.injection.put_in`).
"""

from wdanalysis.training.fast.acceleration import accelerate, restore

__all__ = ["accelerate", "restore"]
