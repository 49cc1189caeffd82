"""What the losses' modules share."""

from __future__ import annotations

from torch import nn


class LossModule(nn.Module):
    """A loss whose settings are its public attributes; repr shows them."""

    def extra_repr(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        del settings["training"]
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())
