"""A dense weight in training that the model reads rounded to its N-bit codes (`scalar/affine.py`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..scalar import RANGES, SCHEMES, Affine, bits_of, fake_quantize, fit_affine
from ..utils.autograd import StraightThrough, in_backward
from ..weights.access import noise_attribute
from ..weights.discovery import Weight
from .parts import AFFINE, AGE, CODES, LATENT, SPEC
from .quantized import dense_weight, swap_in
from .registry import register
from .scalar import ScalarWeight, spec_of

HISTOGRAM_REFRESH = 100  # training forwards between two searches for a histogram's range


@register("intN latent")
class LatentIntWeight(ScalarWeight):
    """A dense weight that is seen through its N-bit codes, with straight-through gradients to the dense one.

    A checkpoint holds the dense weight under its own name, `….fc1.weight`, and `….fc1.weight.scalar`: N and the range.
    In eval mode the range is that of the weight as it is; in training min and max too, and a histogram's is searched
    for again every HISTOGRAM_REFRESH forwards.

    Args:
        latent: the stored Parameter, (rows, …) or turned, which keeps its place in the optimizer.
        bits: N.
        range_: tensor, channel or histogram.
        name: of the module, for messages.
        turned: whether `latent` has its inputs first (`weights/blocks.py`).
    """

    plan_schemes = SCHEMES
    entries = (SPEC, AFFINE, AGE)  # and the dense weight under its own name, LATENT among the parts
    needs = (LATENT, SPEC, AFFINE)

    def __init__(
        self, latent: nn.Parameter, bits: int, range_: str, name: str = "weight", turned: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.latent = latent
        self.bits, self.range, self.turned = bits, range_, turned
        on = latent.device
        spec = [bits, RANGES.index(range_), *[1] * turned]  # two numbers where nothing is turned, as always
        self.register_buffer(SPEC, torch.tensor(spec, dtype=torch.uint8, device=on))
        channels = self.shape[0] if range_ == "channel" else 1
        self.register_buffer(AFFINE, torch.zeros(2, channels, device=on))  # found by the last search in training
        self.register_buffer(AGE, torch.zeros((), dtype=torch.long, device=on))  # training forwards
        self._fitted: tuple[tuple[float, ...], Affine] | None = None
        self._count: int | None = None  # `age` as a number: reading the buffer makes a GPU wait

    age: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dense weight's."""
        return self.latent.dtype

    @property
    def matrix(self) -> Tensor:
        """The dense weight as its blocks lie, (rows, …)."""
        return self.latent.transpose(0, 1) if self.turned else self.latent

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The weight's shape as its blocks lie."""
        return self.matrix.shape

    def fit(self) -> Affine:
        """The scales and zero points, (1,) or (rows,) each, of the weight as it is.

        A histogram's are searched for when the model changes its mode, or the weight its version or its extremes:
        optimizers write through `.data`, which leaves no other trace.

        Raises:
            UserError: the weight holds NaN or infinity.
        """
        if self.range != "histogram":
            return fit_affine(self.name, self.matrix, self.bits, self.range)
        low, high = self.latent.detach().aminmax()
        version = (float(self.latent.data_ptr()), float(self.latent._version), float(low), float(high))
        if self._fitted is None or self._fitted[0] != version:
            with torch.inference_mode(False):  # what is kept is used outside of that mode too
                self._fitted = (version, fit_affine(self.name, self.latent.detach(), self.bits, self.range))
        return self._fitted[1]

    def train(self, mode: bool = True) -> "LatentIntWeight":
        """As any module's."""
        self._fitted = None
        super().train(mode)
        return self

    def decode(self) -> Tensor:
        """The weight rounded to its codes, of its shape (rows, …).

        Raises:
            UserError: the weight holds NaN or infinity; in training on a GPU only a histogram's search checks it.
        """
        if not self.training:
            return fake_quantize(self.matrix, self.fit())
        return StraightThrough.apply(self.matrix, fake_quantize(self.matrix, self._in_training()))  # type: ignore[no-untyped-call]

    def _in_training(self) -> Affine:
        if self.range != "histogram":
            return fit_affine(self.name, self.matrix, self.bits, self.range, check=not self.latent.is_cuda)
        if not in_backward():  # not a layer that runs again in backward
            count = int(self.age) if self._count is None else self._count
            if count % HISTOGRAM_REFRESH == 0:
                self.affine.copy_(fit_affine(self.name, self.latent, self.bits, self.range).to_tensor())
            self.age += 1
            self._count = count + 1
        return Affine.of_tensor(self.affine, self.bits)

    def parts(self) -> dict[str, Tensor]:
        """Codes (rows, …) uint8; scales and zero points (2, 1) or (2, rows).

        Raises:
            UserError: the weight holds NaN or infinity.
        """
        affine = self.fit()
        return {CODES: affine.codes(self.matrix.detach()), AFFINE: affine.to_tensor()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix[:-1]] = destination.pop(prefix + LATENT)  # under the dense weight's own name

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *lists: Any) -> None:
        missing: list[str] = lists[0]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        missing[:] = [name for name in missing if name not in (prefix + SPEC, prefix + AFFINE, prefix + AGE)]
        self._fitted = self._count = None

    def extra_repr(self) -> str:
        """Shape, bits and range, for printing."""
        return f"shape={tuple(self.shape)}, bits={self.bits}, range={self.range}"

    @classmethod
    def adopt(cls, weight: Weight, parts: Mapping[str, Tensor]) -> bool:
        """Let the model read the weight through codes of the N and range in `parts`; returns whether anything changed.

        Args:
            weight: dense, or in this format, perhaps of another N or range.
            parts: its entries in the state: LATENT (rows, …), SPEC (2,), AFFINE (2, 1) or (2, rows).

        Raises:
            UserError: the weight holds codes, and no dense weight to train.
        """
        stored, (bits, range_, _) = weight.stored, spec_of(parts)
        if isinstance(stored, LatentIntWeight):
            if (stored.bits, stored.range) == (bits, range_):
                return False
            set_spec(weight, stored, bits, range_)
            return True
        if isinstance(stored, nn.Module):
            raise UserError(
                f"{weight.name}: holds codes and cannot take a weight in training; load it into a dense model"
            )
        to_int_(weight, bits, range_)
        return True

    @classmethod
    def dense(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight `parts[LATENT]`, of its shape, rounded to its codes.

        Raises:
            UserError: the weight holds NaN or infinity.
        """
        latent, (bits, range_, turned) = nn.Parameter(parts[LATENT], requires_grad=False), spec_of(parts)
        seen = cls(latent, bits, range_, turned=turned).eval().decode()
        return seen.transpose(0, 1) if turned else seen

    @classmethod
    def dense_shape(cls, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """(rows, …), the shape of the dense weight."""
        return tuple(parts[LATENT].shape)

    @classmethod
    def quantize_(cls, weight: Weight, scheme: str, range_: str) -> "LatentIntWeight":
        """Call `to_int_` with the N of the scheme.

        Raises:
            UserError: the weight is quantized already.
        """
        return to_int_(weight, bits_of(scheme) or 8, range_)

    @classmethod
    def seen(cls, name: str, dense: Tensor, scheme: str, range_: str) -> Tensor:
        """phi_intN(dense), of the shape (rows, …) and dtype of `dense`.

        Raises:
            UserError: `dense` holds NaN or infinity.
        """
        return fake_quantize(dense.detach(), fit_affine(name, dense, bits_of(scheme) or 8, range_))


def set_spec(weight: Weight, stored: LatentIntWeight, bits: int, range_: str) -> None:
    """Change N and the range of a weight in this format; its noise stays."""
    _swap_with_noise(weight, LatentIntWeight(stored.latent, bits, range_, weight.name, weight.turned))


def _swap_with_noise(weight: Weight, quantized: LatentIntWeight) -> None:
    kept = [module.__dict__.get(noise_attribute(key)) for _, module, key in weight.places]
    swap_in(weight, quantized)
    for (_, module, key), its in zip(weight.places, kept, strict=True):
        if its is not None:
            module.__dict__[noise_attribute(key)] = its


def to_int_(weight: Weight, bits: int, range_: str, *, noise: bool = False) -> LatentIntWeight:
    """Make a stored weight one that is seen in N-bit codes, for its owner and every alias; returns the new weight.

    Args:
        weight: a weight of the model, not quantized yet.
        bits: N.
        range_: tensor, channel or histogram.
        noise: keep the noise on it: training then sees the noise's share of codes, evaluation all of them.

    Raises:
        UserError: the weight is quantized already.
    """
    dense_weight(weight)
    parameter: Any = weight.parameter
    quantized = LatentIntWeight(parameter, bits, range_, weight.name, weight.turned)
    (_swap_with_noise if noise else swap_in)(weight, quantized)
    return quantized
