"""A method of one file: patch tokens are pulled to their image's mean token."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from unirefiner_hf.methods.objective import Objective
from unirefiner_hf.methods.settings import BORDER, MethodSettings


@dataclass
class ToySettings(MethodSettings):
    """How hard to pull."""

    name = "toy"
    title = "toy"
    ending = "toyed"
    unread = dict.fromkeys(BORDER, "it trains without a border of registers")
    summary = "{base}, its patch tokens pulled to their mean with weight {pull}."
    usage = "Do not use it."

    pull: float = field(default=1.0, metadata={"help": "Weight of the loss."})

    @classmethod
    def objective(cls) -> type[Objective]:
        """See `MethodSettings.objective`."""
        return Toy


class Toy(Objective):
    """One step of it."""

    LOSS_TERMS = ("loss_toy",)
    METRICS = LOSS_TERMS

    def forward(self, pixel_values: Tensor, progress: float = 1.0) -> dict[str, Tensor]:
        """See `Objective.forward`."""
        with self.teaching():
            mean = self.encode(pixel_values, 0).mean(dim=1, keepdim=True)
        image = self.model.encode(pixel_values, register_width=0).image
        term = functional.mse_loss(image, mean.expand_as(image))
        return {"loss": self.settings.pull * term, "loss_toy": term.detach()}
