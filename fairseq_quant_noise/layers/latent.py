"""A dense weight in training that the model reads rounded to its N-bit codes (`scalar/affine.py`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import in_graph
from ..scalar import LEARNED_RANGES, SCHEMES, STAGE_RANGES, Affine, bits_of, by_channel, fake_quantize, fit_affine
from ..utils.autograd import StraightThrough, in_backward
from ..weights.access import noise_attribute
from ..weights.discovery import Weight
from .parts import AFFINE, AGE, CODES, LATENT, LOG_SCALE, SPEC
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
        range_: one of `scalar.STAGE_RANGES`.
        name: of the module, for messages.
        turned: whether `latent` has its inputs first (`weights/blocks.py`).
    """

    plan_schemes: tuple[str, ...] = SCHEMES
    entries: tuple[str, ...] = (SPEC, AFFINE, AGE)  # and the dense weight under its own name, LATENT among the parts
    needs: tuple[str, ...] = (LATENT, SPEC, AFFINE)

    def __init__(
        self, latent: nn.Parameter, bits: int, range_: str, name: str = "weight", turned: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.latent = latent
        self.bits, self.range, self.turned = bits, range_, turned
        on = latent.device
        spec = [bits, STAGE_RANGES.index(range_), *[1] * turned]  # two numbers where nothing is turned, as always
        self.register_buffer(SPEC, torch.tensor(spec, dtype=torch.uint8, device=on))
        channels = self.shape[0] if by_channel(range_) else 1
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

    def begin_at(self, numbers: Tensor, affine: Affine) -> None:
        """Give the dense weight other numbers (rows, …) to begin at, which lie on the codes `affine`.

        It becomes a new Parameter: an optimizer in half precision has its own copy of the old one's numbers.
        """
        stored = numbers.transpose(0, 1) if self.turned else numbers
        stored = stored.to(self.latent, copy=True, memory_format=torch.contiguous_format)
        self.latent = nn.Parameter(stored, requires_grad=self.latent.requires_grad)

    def fit(self) -> Affine:
        """The scales and zero points, (1,) or (rows,) each, of the weight as it is.

        A histogram's are searched for when the model changes its mode, or the weight its version or its extremes:
        optimizers write through `.data`, which leaves no other trace.

        Raises:
            UserError: the weight holds NaN or infinity.
        """
        if self.range != "histogram":
            return fit_affine(self.name, self.matrix, self.bits, self.range, check=not in_graph())
        low, high = self.latent.detach().aminmax()
        version = (float(self.latent.data_ptr()), float(self.latent._version), float(low), float(high))
        if self._fitted is None or self._fitted[0] != version:
            with torch.inference_mode(False):  # what is kept is used outside of that mode too
                self._fitted = (version, fit_affine(self.name, self.matrix.detach(), self.bits, self.range))
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
                self.affine.copy_(fit_affine(self.name, self.matrix, self.bits, self.range).to_tensor())
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

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix[:-1]] = destination.pop(prefix + LATENT)  # under the dense weight's own name

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: object, strict: bool, *lists: list[str]
    ) -> None:
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
            DamagedFileError: the entry SPEC holds no N and range.
        """
        stored, (bits, range_, _) = weight.stored, spec_of(parts, weight.tensor_name)
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
            DamagedFileError: the entry SPEC holds no N and range.
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


class _Scaled(torch.autograd.Function):
    """phi_intN with a scale that learns (LSQ, arXiv 1902.08153): s = s_0 exp(t), with a fixed zero point."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, log_scale: Tensor, affine: Affine) -> Tensor:
        """The weight (rows, …) rounded to the codes of `affine`, whose scales `log_scale`, (1,) or (rows,), moves."""
        shape = (-1, *[1] * (latent.dim() - 1))
        scale, zero = affine.scale.view(shape), affine.zero_point.float().view(shape)
        exact = latent.float() * (1 / scale)  # (rows, …); as in `Affine.rounded`, so that the codes are the same
        nearest = exact.round()
        codes = (nearest + zero).clamp_(0, 2**affine.bits - 1)
        inside = nearest + zero == codes
        ctx.save_for_backward(inside, torch.where(inside, nearest - exact, codes - zero) * scale)
        ctx.channels, ctx.dtype = log_scale.numel(), log_scale.dtype
        ctx.weight = (latent.numel() / ctx.channels * (2**affine.bits - 1)) ** -0.5
        return ((codes - zero) * scale).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """To the weight straight through, but where it is clipped; to the scale weighted by 1 / sqrt(n (2^N - 1))."""
        inside, slope = ctx.saved_tensors
        per_number = gradients[0].float() * slope  # (rows, …)
        of_scale = per_number.reshape(ctx.channels, -1).sum(1) * ctx.weight
        return gradients[0] * inside, of_scale.to(ctx.dtype), None


@register("intN learned")
class LearnedIntWeight(LatentIntWeight):
    """A weight in training whose scales are Parameters too: what trained codes are to product quantization.

    `affine` holds where the scales started, and the zero points, which stay; `log_scale`, (1,) or (rows,), is what the
    optimizer moves.
    """

    plan_schemes = ()  # LatentIntWeight makes it, by the range
    entries = (*LatentIntWeight.entries, LOG_SCALE)
    needs = (*LatentIntWeight.needs, LOG_SCALE)

    def __init__(
        self, latent: nn.Parameter, bits: int, range_: str, name: str = "weight", turned: bool = False
    ) -> None:
        super().__init__(latent, bits, range_, name, turned)
        self.log_scale = nn.Parameter(torch.zeros(self.affine.shape[1], dtype=latent.dtype, device=latent.device))

    def start(self) -> None:
        """Let scales and zero points start from those of least squared error.

        Raises:
            UserError: the weight holds NaN or infinity.
        """
        self.affine.copy_(fit_affine(self.name, self.matrix, self.bits, self.range).to_tensor())

    def begin_at(self, numbers: Tensor, affine: Affine) -> None:
        """As of the class above; the scales begin at those of `affine`."""
        super().begin_at(numbers, affine)
        self.affine.copy_(affine.to_tensor())

    def fit(self) -> Affine:
        """The scales as they are now, and the zero points: (1,) or (rows,) each."""
        scale, zero_point = self.affine
        return Affine(scale * self.log_scale.detach().float().exp(), zero_point.int(), self.bits)

    def decode(self) -> Tensor:
        """The weight rounded to its codes, of its shape (rows, …)."""
        if not self.training:
            return fake_quantize(self.matrix, self.fit())
        return _Scaled.apply(self.matrix, self.log_scale, self.fit())  # type: ignore[no-untyped-call]

    @classmethod
    def dense(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight `parts[LATENT]`, of its shape, rounded to its codes."""
        bits, range_, turned = spec_of(parts)
        made = cls(nn.Parameter(parts[LATENT], requires_grad=False), bits, range_, turned=turned).eval()
        made.affine, made.log_scale = parts[AFFINE], nn.Parameter(parts[LOG_SCALE], requires_grad=False)
        return made.decode().transpose(0, 1) if turned else made.decode()


def _kind(range_: str) -> type[LatentIntWeight]:
    return LearnedIntWeight if range_ in LEARNED_RANGES else LatentIntWeight


def set_spec(weight: Weight, stored: LatentIntWeight, bits: int, range_: str) -> None:
    """Change N and the range of a weight in this format; its noise stays."""
    _swap_with_noise(weight, _kind(range_)(stored.latent, bits, range_, weight.name, weight.turned))


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
        range_: one of `scalar.STAGE_RANGES`.
        noise: keep the noise on it: training then sees the noise's share of codes, evaluation all of them.

    Raises:
        UserError: the weight is quantized already, or a learned range starts from NaN or infinity.
    """
    dense_weight(weight)
    parameter: Any = weight.parameter
    quantized = _kind(range_)(parameter, bits, range_, weight.name, weight.turned)
    if isinstance(quantized, LearnedIntWeight) and not parameter.is_meta:  # else the state to come has the scales
        quantized.start()
    (_swap_with_noise if noise else swap_in)(weight, quantized)
    return quantized
