"""The optimiser: float32 masters learn by AdamW; the model's own weights, in whatever dtype computes, follow them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from infinitevl.config import DELTA
from infinitevl.model import Model
from infinitevl.train import parallel
from infinitevl.train.parallel import World
from infinitevl.train.recipes import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


def rate_at(recipe: Recipe, step: int) -> float:
    """Share of the learning rate at a step counted from 0: up in a line over the warm-up, then down as a cosine."""
    rising = max(1, round(recipe.warmup * recipe.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, recipe.steps - rising)))


def decays(name: str, tensor: Tensor) -> bool:
    """Whether a parameter takes weight decay: matrices do; A_log, dt_bias, norms, biases and convolutions do not.

    Decay would pull dt_bias to zero, where a delta head forgets at once.
    """
    return tensor.dim() == 2 and not name.endswith("_conv")


class Masters:
    """Masters of the parameters that train, by name. Under FSDP2 a process holds its part of each."""

    def __init__(self, model: Model, names: Sequence[str], recipe: Recipe, world: World) -> None:
        parameters = dict(model.named_parameters())
        self.world, self.recipe = world, recipe
        self.live = {name: parameters[name] for name in names}
        self.masters = {name: self._master(parameter) for name, parameter in self.live.items()}
        deltas = {f"blocks.{n}.mixer." for n, mixer in enumerate(model.config.text.layers) if mixer == DELTA}
        self.optimizer = torch.optim.AdamW(
            list(self._groups(deltas)),
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            fused=world.device.type == "cuda",
        )

    @staticmethod
    def _master(parameter: Tensor) -> Tensor:
        master = parallel.local(parameter).detach().float().clone()
        master.grad = torch.zeros_like(master)
        return master

    def _groups(self, deltas: set[str]) -> Iterator[dict[str, object]]:
        """Groups of one weight decay and one learning rate: the delta mixers may have a rate of their own."""
        for is_delta in (True, False):
            for decay in (True, False):
                named = {
                    name: master
                    for name, master in self.masters.items()
                    if name.startswith(tuple(deltas)) == is_delta and decays(name, master) == decay
                }
                if named:
                    scale = self.recipe.delta_scale if is_delta else 1.0
                    weight_decay = self.recipe.weight_decay if decay else 0.0
                    yield {"params": list(named.values()), "weight_decay": weight_decay, "scale": scale}

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of the model's weights to the masters', in float32."""
        for name, parameter in self.live.items():
            if parameter.grad is not None:
                scale = self.world.size if parallel.is_split(parameter) else 1  # FSDP2 gives the mean over processes
                grad = self.masters[name].grad
                assert grad is not None
                grad.add_(parallel.local(parameter.grad).float(), alpha=scale)
                parameter.grad = None

    @torch.no_grad()
    def reduce(self, tokens: float) -> float:
        """Sum what is not split over the processes, divide by the step's tokens; the norm of the gradient."""
        whole = [self._grad(name) for name, p in self.live.items() if not parallel.is_split(p)]
        split = [self._grad(name) for name, p in self.live.items() if parallel.is_split(p)]
        for gradient in whole:
            parallel.summed(gradient, self.world)
        torch._foreach_div_([*whole, *split], tokens)
        return float(parallel.norm(split, whole, self.world))

    @torch.no_grad()
    def step(self, share: float, norm: float) -> None:
        """One update at a share of the learning rate, the gradient cut to the recipe's norm."""
        torch._foreach_mul_([self._grad(name) for name in self.masters], min(1.0, self.recipe.clip / (norm + 1e-6)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * share * group["scale"]
        self.optimizer.step()
        self.follow()

    @torch.no_grad()
    def clear(self) -> None:
        """Forget the gradients."""
        torch._foreach_zero_([self._grad(name) for name in self.masters])

    @torch.no_grad()
    def follow(self) -> None:
        """Copy the masters into the model's weights."""
        torch._foreach_copy_([parallel.local(p) for p in self.live.values()], list(self.masters.values()))

    def _grad(self, name: str) -> Tensor:
        gradient = self.masters[name].grad
        assert gradient is not None
        return gradient

    def state(self) -> dict[str, Tensor]:
        """Masters and moments by name, and how many updates each has had: all that goes on from here."""
        tensors = {f"master.{name}": parallel.like(self.masters[name], p) for name, p in self.live.items()}
        for name, parameter in self.live.items():
            kept = self._moments(name)
            tensors |= {f"{each}.{name}": parallel.like(kept[each], parameter) for each in MOMENTS}
        return tensors

    def _moments(self, name: str) -> dict[str, Tensor]:
        """The optimiser's tensors of one master, made where it has not stepped yet."""
        master = self.masters[name]
        kept = self.optimizer.state[master]
        if not kept:
            device = master.device if self.world.device.type == "cuda" else torch.device("cpu")
            kept["step"] = torch.zeros((), dtype=torch.float32, device=device)
            kept |= {each: torch.zeros_like(master) for each in MOMENTS}
        return kept

    @property
    def updates(self) -> int:
        """How many updates there were; steps that were skipped do not count."""
        return int(self._moments(next(iter(self.masters)))["step"])

    @torch.no_grad()
    def restore(self, updates: int) -> None:
        """Go on from tensors that were written into what `state` gave."""
        for name in self.masters:
            self._moments(name)["step"].fill_(updates)
        self.follow()
