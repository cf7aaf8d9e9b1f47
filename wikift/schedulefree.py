"""Schedule-free AdamW (Defazio et al., arXiv:2405.15682): no rate to lower, no length to know beforehand.

Three points of each weight: z makes AdamW's steps (without momentum), x is the mean of the z so far, and gradients are
taken at y = (1 - beta1) z + beta1 x. Parameters hold y; z and exp_avg_sq are kept beside it, as much memory as AdamW
takes, and x, the weights to be evaluated, follows from y and z. A step weighs in the mean as the square of the highest
rate so far, so that a warm-up counts little.

The update is what the authors' library `schedulefree` computes (the tests compare them). It is written anew because
the library counts steps in its parameter groups, and ZeRO-3 calls an optimizer once for each part of the parameters;
because it is known on the device only whether a step is to be skipped; and because a checkpoint keeps fp32 numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

NUMBERS = ("step", "highest_lr", "averaged_steps")  # of each parameter, 0-d; the moments are z and exp_avg_sq
_PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements updated at a time: what stays in a core's cache; 256 MiB


class _Rates(NamedTuple):
    """The numbers of one update, 0-d on the parameters' device; of a skipped one those that change nothing."""

    skip: Tensor  # bool
    kept: Tensor  # of the mean square: beta2
    correction: Tensor  # 1 - beta2 ** updates
    share: Tensor  # of this z in the mean
    y_rate: Tensor
    z_rate: Tensor


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """As torch's fused AdamW it takes `grad_scale` (gradients are divided by it) and `found_inf` (1: skip the step).

    A skipped step leaves weights and states as they were; nothing waits for the device.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        assert 0 < betas[0] < 1, "x cannot be told from y without momentum"
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def beta1(self) -> float:
        return float(self.defaults["betas"][0])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, parameter in trained:
            if not self.state[parameter]:
                self.state[parameter] = fresh_state(parameter)
        if not trained:
            return
        # all parameters of a call have made the same steps: their numbers are computed once and shared, never changed
        rates, numbers = self._advanced(self.state[trained[0][1]], trained[0][0])
        for group, parameter in trained:
            state, gradient = self.state[parameter], parameter.grad.reshape(-1)
            size = _PIECE.get(parameter.device.type, 1 << 26)
            tensors = (parameter.view(-1), gradient, state["z"].view(-1), state["exp_avg_sq"].view(-1))
            for pieces in zip(*(tensor.split(size) for tensor in tensors), strict=True):
                self._update(pieces, rates, group)
            state |= numbers

    def _advanced(self, state: dict[str, Tensor], group: dict[str, Any]) -> tuple[_Rates, dict[str, Tensor]]:
        """The rates of the update after `state`, and its numbers after that.

        The library sums the weights lr_max^2 of all steps. This counts them in units of the newest (averaged_steps), so
        that at a constant rate the sum grows by exactly 1, in fp32 too.
        """
        (beta1, beta2), lr = group["betas"], group["lr"]
        updates, highest, averaged = (state[name] for name in NUMBERS)
        skip = torch.zeros_like(updates, dtype=torch.bool) if self.found_inf is None else self.found_inf > 0
        higher = highest.clamp(min=lr)
        moved = higher > 0  # the first step of a warm-up has a rate of 0
        longer = torch.where(moved, averaged * (highest / higher).square() + 1, 0.0)
        share = torch.where(moved & ~skip, 1 / longer, 0.0)
        z_rate = torch.where(skip, 0.0, lr)
        rates = _Rates(
            skip=skip,
            kept=torch.where(skip, 1.0, beta2),
            correction=(1 - beta2 ** (updates.double() + 1)).float(),
            share=share,
            y_rate=z_rate * (1 - beta1 * (1 - share)),
            z_rate=z_rate,
        )
        after = (updates + ~skip, torch.where(skip, highest, higher), torch.where(skip, averaged, longer))
        return rates, dict(zip(NUMBERS, after, strict=True))

    def _update(self, pieces: tuple[Tensor, ...], rates: _Rates, group: dict[str, Any]) -> None:
        """One update of 1-D tensors (y, gradient, z, mean square) in place; the gradient is left alone."""
        y, gradient, z, square = pieces
        _, beta2 = group["betas"]
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if self.found_inf is not None:
            gradient = gradient.masked_fill(rates.skip, 0.0)
        square.mul_(rates.kept).addcmul_(gradient, gradient, value=1 - beta2)
        update = gradient / (square / rates.correction).sqrt_().add_(group["eps"])
        if group["weight_decay"]:
            update.add_(y, alpha=group["weight_decay"])
        y.add_((z - y).mul_(rates.share)).sub_(update * rates.y_rate)
        z.sub_(update.mul_(rates.z_rate))


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """The states of a parameter that has made no step: z begins where the weight does."""
    numbers = {name: torch.zeros((), device=parameter.device) for name in NUMBERS}
    return {**numbers, "z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}


def z_share(beta1: float) -> float:
    """The share of z - y by which x is off y: x = y + z_share (z - y), rounded after each of the three operations."""
    return 1 - 1 / beta1


@contextlib.contextmanager
def at_average(optimizer: torch.optim.Optimizer, refresh: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While it lasts, schedule-free weights are x; after it what they were, to the last bit. Takes a copy of them.

    `refresh` makes what is computed with from the weights. It may be collective, so after an exception, which ends the
    run, nothing is put back. Other optimizers evaluate the weights that they train.
    """
    if not isinstance(optimizer, ScheduleFreeAdamW):
        yield
        return
    kept = {}
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            y = kept[weight] = weight.detach().clone()
            weight.copy_(state["z"]).sub_(y).mul_(z_share(optimizer.beta1)).add_(y)
    refresh()
    yield
    with torch.no_grad():
        for weight, y in kept.items():
            weight.copy_(y)
    refresh()
