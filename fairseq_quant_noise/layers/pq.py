"""A weight as a codebook and codes:  W_hat[block i] = centroids[codes[i]]     (arXiv 2004.07320, equation 3).

With row scales (`pq/row_scales.py`), row r of it is s_r times its centroids. A product with x is that of the centroids,
multiplied by s: an output is the product of x with one row.

Several weights may share one codebook: they hold the same Parameter, and in a state the same codebook number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import SETTLED, decode, in_graph, linear, linear_of_centroids, takes_integers, takes_linear
from ..scalar import Affine, fake_quantize, fit_affine
from ..utils.bits import code_dtype
from ..weights.discovery import Weight
from .inputs import GRID
from .lookup import Lookup
from .parts import AFFINE, CENTROID_BITS, CENTROIDS, CODEBOOK, CODES, FILE_AFFINE, LATENT_WEIGHT, SCALES
from .pq_file import PackedPQ
from .quantized import dense_weight, is_multiplied, swap_in
from .registry import QuantizedTensor, register

_DERIVED = ("_all_codes", "_in_bytes")  # attributes of rounded centroids: what the CPU's kernels keep of them


@register("pq")
class PQWeight(PackedPQ):
    """A product-quantized weight.

    Args:
        codes: (rows, blocks a row), each below K; uint8, or int32 where K is above 256.
        centroids: (K, d).
        shape: of the dense weight.
        centroid_bits: 16 for fp16 centroids, 8 for int8 ones.
        affine: (2, 1), scale and zero point of the int8 centroids of a file, which `centroids` has been decoded from.
        codebook: the number of a shared codebook; `join` makes it one.
        block_major: let codes lie in memory as `kernels.linear` reads them, a row for each block of the input; their
            shape stays.
        scales: (rows,), where each row has one.
    """

    scheme = "pq"
    plan_schemes: tuple[str, ...] = (scheme,)
    file_schemes: tuple[str, ...] = (scheme,)
    entries: tuple[str, ...] = (CODES, CENTROIDS, CENTROID_BITS, CODEBOOK, FILE_AFFINE, SCALES)
    needs: tuple[str, ...] = (CODES, CENTROIDS)
    has_codebook = True
    full_precision: tuple[str, ...] = (FILE_AFFINE,)

    def __init__(
        self,
        codes: Tensor,
        centroids: Tensor,
        shape: tuple[int, ...],
        centroid_bits: int = 16,
        affine: Tensor | None = None,
        codebook: int | None = None,
        block_major: bool = False,
        scales: Tensor | None = None,
    ) -> None:
        super().__init__()
        if codebook is not None:
            self.register_buffer(CODEBOOK, torch.tensor(codebook, dtype=torch.int32, device=codes.device))
        self.codebook_number = codebook
        self.users: tuple[PQWeight, ...] = (self,)  # the weights that use the codebook, this one among them
        self._turned: tuple[Tensor, Tensor] | None = None  # (codes at the last call, their transpose)
        self._counted: tuple[Tensor, int, Tensor] | None = None
        self.register_buffer(FILE_AFFINE, affine)
        self.block_major = block_major
        self.register_buffer(CODES, self._laid_out(codes, centroids))
        self.centroids = nn.Parameter(centroids)
        self.register_parameter(SCALES, None if scales is None else nn.Parameter(scales))
        if centroid_bits != 16:  # so that checkpoints with fp16 centroids hold codes and centroids alone
            bits = torch.tensor(centroid_bits, dtype=torch.uint8, device=codes.device)
            self.register_buffer(CENTROID_BITS, bits)
        self.bits = centroid_bits
        self._stored: tuple[Tensor, Tensor] | None = None  # (centroids at the last call, their fp16 or int8 rounding)
        self._stored_scales: tuple[Tensor, Tensor] | None = None  # the same of the row scales
        self.shape = torch.Size(shape)

    codes: Tensor
    file_affine: Tensor | None
    scales: nn.Parameter | None

    @property
    def block_size(self) -> int:
        """d."""
        return self.centroids.shape[1]

    @property
    def n_centroids(self) -> int:
        """K."""
        return self.centroids.shape[0]

    def affine(self) -> Affine:
        """The codes of the centroids, when they are stored in 8 bits: one range for the codebook.

        The file's own while the centroids are as they came from it: a range found again could differ in its last digit.
        """
        if self.file_affine is not None:
            affine = Affine.of_tensor(self.file_affine, self.bits)
            if in_graph() or torch.equal(fake_quantize(self.centroids, affine), self.centroids):
                return affine
        return fit_affine("centroids", self.centroids, self.bits, "tensor", check=not in_graph())

    def stored_centroids(self) -> Tensor:
        """The centroids (K, d) as the file holds them: rounded to fp16 or to 8 bits, in the model's own dtype."""
        # From `_parameters` at once: nn.Module finds an attribute there in half a microsecond.
        centroids: Tensor = self._parameters[CENTROIDS]  # type: ignore[assignment]
        if torch.is_grad_enabled() or in_graph() or centroids.device.type != "cpu":  # a GPU would have to wait
            return self._rounded()
        # A generation asks for them at every token. By value: optimizers write to `.data`, which no version counts.
        kept = self._stored
        if kept is None or kept[0].dtype != centroids.dtype or not torch.equal(kept[0], centroids):
            with torch.inference_mode(False):  # or what is kept could not be used outside of that mode
                self._stored = kept = centroids.detach().clone(), self._rounded().detach().clone()
            setattr(kept[1], SETTLED, True)
        return kept[1]

    def kept(self) -> list[Tensor]:
        """Copies of the centroids in memory for look-ups: two (K, d); with the CPU's kernels (256, d), (d, 256) too."""
        stored = self._stored or ()
        return [*stored, *(t for name in _DERIVED for of in stored[1:] for t in getattr(of, name, ()))]

    def _rounded(self) -> Tensor:
        if self.bits == 16:
            return self.centroids.half().to(self.centroids.dtype)
        return fake_quantize(self.centroids, self.affine())

    def stored_scales(self) -> Tensor | None:
        """The row scales (rows,) as the file holds them, rounded to fp16, in the model's own dtype; None without."""
        scales = self._parameters[SCALES]
        if scales is None or torch.is_grad_enabled() or in_graph() or scales.device.type != "cpu":
            return None if scales is None else scales.half().to(scales.dtype)
        kept = self._stored_scales  # as `stored_centroids` does
        if kept is None or kept[0].dtype != scales.dtype or not torch.equal(kept[0], scales):
            with torch.inference_mode(False):
                own = scales.detach().clone()
                self._stored_scales = kept = own, own.half().to(own.dtype)
        return kept[1]

    def decode(self) -> Tensor:
        """The dense weight, of `shape` (rows, …); in eval mode of centroids and scales as the file holds them.

        So scores agree. In training, 8-bit centroids are seen rounded too, with straight-through gradients.
        """
        if self.training:
            codes = self.codes.flatten().long().view(self.codes.shape)  # a copy: these may change before backward
            seen = self.centroids.detach() if self.bits == 16 else self.stored_centroids()
            count = torch.stack([user.count() for user in self.users]).sum(0).clamp_(min=1)  # (K, 1)
            latent = self._parameters.get(LATENT_WEIGHT)
            return Lookup.apply(self.centroids, seen, codes, count, latent, self.scales).view(self.shape)  # type: ignore[no-untyped-call]
        scales = self.stored_scales()
        if torch.is_grad_enabled():
            rows = self.stored_centroids().index_select(0, self.codes.flatten().long()).view(len(self.codes), -1)
        else:
            rows = decode(self.codes, self.stored_centroids())
        return (rows if scales is None else rows * scales[:, None]).view(self.shape)

    def count(self) -> Tensor:
        """Blocks of each centroid in this weight: (K, 1)."""
        codes, kept = self.codes, self._counted
        if kept is None or kept[0] is not codes or kept[1] != codes._version:
            count = torch.bincount(codes.flatten().long(), minlength=self.n_centroids).unsqueeze(1)  # (K, 1)
            self._counted = kept = codes, codes._version, count
        return kept[2]

    def multiplies(self, x: Tensor) -> bool:
        """Whether `linear` takes x (..., I): gradients are off, the weight is (O, I), and codes are faster."""
        settled, centroids = not torch.is_grad_enabled() and len(self.shape) == 2, self._parameters[CENTROIDS]
        return settled and (self.in_integers(x) or takes_linear(x, centroids))  # type: ignore[arg-type]

    def in_integers(self, x: Tensor) -> bool:
        """Whether `linear` multiplies x (..., I) by 8-bit centroids in whole numbers."""
        return self.bits == 8 and self.n_centroids <= 256 and self.dtype == torch.float32 and takes_integers(x)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias for (..., I), where `multiplies` says so: (..., O)."""
        kept = self._turned
        if kept is None or kept[0] is not self.codes:  # a view takes as long as a small product
            self._turned = kept = self.codes, self.codes.t()
        scales, added = self.stored_scales(), bias if self.scales is None else None
        if self.in_integers(x):
            found = linear_of_centroids(x, kept[1], *self._centroids_in_bytes(), added, getattr(x, GRID, None))
        else:
            found = linear(x, kept[1], self.stored_centroids(), added)
        return found if scales is None else _times(found, scales, bias)

    def _centroids_in_bytes(self) -> tuple[Tensor, Tensor]:
        """The 8-bit centroids (256, d) uint8, zeros beyond K, and their scale and zero point (2, 1)."""
        if in_graph():
            return self._found_in_bytes()
        stored = self.stored_centroids()
        if not hasattr(stored, "_in_bytes"):
            stored._in_bytes = self._found_in_bytes()  # type: ignore[attr-defined]
        return stored._in_bytes  # type: ignore[attr-defined]

    def _found_in_bytes(self) -> tuple[Tensor, Tensor]:
        affine = self.affine()
        numbers = affine.codes(self.centroids.detach())
        return F.pad(numbers, (0, 0, 0, 256 - len(numbers))), affine.to_tensor()

    def _laid_out(self, codes: Tensor, centroids: Tensor) -> Tensor:
        codes = codes.to(code_dtype(len(centroids)))
        return codes.t().contiguous().t() if self.block_major else codes

    def has_rows(self) -> bool:
        """Whether gradients are off."""
        return not torch.is_grad_enabled()

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows of these numbers, decoded: (...) int64 -> (..., I)."""
        flat, scales = numbers.flatten(), self._parameters[SCALES]
        found = self.stored_centroids().index_select(0, self.codes[flat].flatten().long())
        if scales is not None:
            own = scales[flat, None]  # (n, 1): fewer than all, which `stored_scales` would round
            found = found.view(len(flat), -1) * own.half().to(own.dtype)
        return found.view(*numbers.shape, *self.shape[1:])

    def facts(self) -> dict[str, Any]:
        """d, K, the bits of a centroid's numbers, and whether rows have scales."""
        sizes = {"block_size": self.block_size, "n_centroids": self.n_centroids, "centroid_bits": self.bits}
        return sizes | {"row_scales": self.scales is not None}

    def parts(self) -> dict[str, Tensor]:
        """Codes (rows, blocks a row), centroids (K, d) in fp16 or uint8, scale and zero point (2, 1) of the latter.

        And, where rows have them, their scales (rows,) in fp16.
        """
        found = {CODES: self.codes} | ({} if self.scales is None else {SCALES: self.scales.half()})
        if self.bits == 16:
            return found | {CENTROIDS: self.centroids.half()}
        affine = self.affine()
        return found | {CENTROIDS: affine.codes(self.centroids), AFFINE: affine.to_tensor()}

    def pack(self, entry: QuantizedTensor) -> dict[str, Tensor]:
        """`parts` with codes packed, (bytes,); without the centroids where another tensor of the file has them."""
        parts = super().pack(entry)
        own = parts.keys() - ({CENTROIDS, AFFINE} if entry.codebook is not None else set())
        return {name: part for name, part in parts.items() if name in own}

    def shared(self) -> Tensor:
        """The centroids, (K, d)."""
        return self.centroids

    @property
    def paper_bytes(self) -> float:
        """Size by the paper's accounting; the centroids of a shared codebook count with its first user."""
        return self.entry(None if self.users[0] is self else "its first user").paper_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The centroids'."""
        return self.centroids.dtype

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: object, strict: bool, *lists: list[str]
    ) -> None:
        found: Any = state_dict  # a mapping from names to tensors, which may lack these
        codes, centroids = found.get(prefix + CODES), found.get(prefix + CENTROIDS)
        known = codes is not None and codes.numel() > 0 and codes.device.type != "meta" and centroids is not None
        if known and len(centroids) != 256 and not 0 <= int(codes.min()) <= int(codes.max()) < len(centroids):
            lists[2].append(f"{prefix}{CODES}: a code beyond its {len(centroids)} centroids")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self.codes = self._laid_out(self.codes, self.centroids)  # with `assign` they are those of the state

    def extra_repr(self) -> str:
        """Shape, block size and codebook size, for printing."""
        return f"shape={tuple(self.shape)}, block_size={self.block_size}, n_centroids={self.n_centroids}"

    @classmethod
    def adopt(cls, weight: Weight, parts: Mapping[str, Tensor]) -> bool:
        """Install empty codes (rows, blocks a row) and centroids (K, d) of the state's shapes; returns whether it did.

        Raises:
            UserError: they do not fit the weight's shape.
        """
        codes, centroids, scales = parts[CODES], parts[CENTROIDS], parts.get(SCALES)
        if scales is not None and tuple(scales.shape) != weight.shape[:1]:
            raise UserError(
                f"{weight.name}: row scales of shape {tuple(scales.shape)} do not fit a weight of shape "
                f"{weight.shape}; the file is of another architecture or dictionary"
            )
        if centroids.dim() != 2 or codes.numel() * centroids.shape[1] != math.prod(weight.shape):
            raise UserError(
                f"{weight.name}: codes of shape {tuple(codes.shape)} and centroids of shape {tuple(centroids.shape)} "
                f"do not fit a weight of shape {weight.shape}; the file is of another architecture or dictionary"
            )
        stored: Any = weight.stored
        if type(stored) is cls and stored.takes(parts):
            return False
        affine = parts.get(FILE_AFFINE)
        new = cls(
            torch.empty_like(codes, device=stored.device),
            torch.empty_like(centroids, dtype=stored.dtype, device=stored.device),
            weight.shape,
            int(parts.get(CENTROID_BITS, 16)),
            None if affine is None else torch.empty_like(affine, device=stored.device),
            int(parts[CODEBOOK]) if CODEBOOK in parts else None,
            is_multiplied(weight),
            None if scales is None else torch.empty_like(scales, dtype=stored.dtype, device=stored.device),
        )
        new.prepare(parts)
        swap_in(weight, new)
        return True

    def takes(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether it has a place for each of the `parts` of a state, such as codes (rows, blocks a row)."""
        codebook = int(parts[CODEBOOK]) if CODEBOOK in parts else None
        there = self.bits, self.file_affine is None, self.codebook_number, self.scales is None
        wanted = int(parts.get(CENTROID_BITS, 16)), parts.get(FILE_AFFINE) is None, codebook, SCALES not in parts
        return there == wanted

    def prepare(self, parts: Mapping[str, Tensor]) -> None:
        """Make room for what a format derived from this one has besides; called before `parts` are loaded."""

    @classmethod
    def join(cls, weights: "Sequence[PQWeight]") -> None:
        """Let weights whose codebook has the same number hold the first one's centroids, in place.

        Raises:
            UserError: centroids of different shapes or bits under one number.
        """
        users: dict[int, list[PQWeight]] = {}
        for weight in weights:
            if weight.codebook_number is not None:
                users.setdefault(weight.codebook_number, []).append(weight)
        for number, of in users.items():
            first = of[0]
            if any((w.centroids.shape, w.bits) != (first.centroids.shape, first.bits) for w in of):
                raise UserError(
                    f"codebook {number}: weights with other blocks or centroids share it; the state is damaged"
                )
            for weight in of:
                weight.centroids, weight.users = first.centroids, tuple(of)

    @classmethod
    def dense(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight as a matrix (rows, row length), from centroids and scales as the file holds them."""
        bits, affine = int(parts.get(CENTROID_BITS, 16)), parts.get(FILE_AFFINE)
        main = parts[CODES], parts[CENTROIDS], cls.dense_shape(parts)
        return PQWeight(*main, bits, affine, scales=parts.get(SCALES)).eval().decode()

    @classmethod
    def dense_shape(cls, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """(rows, row length)."""
        codes, centroids = parts[CODES], parts[CENTROIDS]
        return codes.shape[0], codes.numel() // codes.shape[0] * centroids.shape[1]


P = TypeVar("P", bound=PQWeight)


def quantize_weight_(
    weight: Weight,
    codes: Tensor,
    centroids: Tensor,
    centroid_bits: int = 16,
    codebook: int | None = None,
    scales: Tensor | None = None,
    *,
    kind: type[P] = PQWeight,  # type: ignore[assignment]
) -> P:
    """Put codes and centroids in the place of a stored weight, for its owner and every alias; returns the new weight.

    Args:
        weight: a weight of the model, not quantized yet.
        codes: (rows, blocks a row) uint8, or int32 where K is above 256.
        centroids: (K, d), taken in the dtype of the stored weight.
        centroid_bits: 16 (fp16) or 8 (int8).
        codebook: the number of a shared one.
        scales: (rows,), where each row has one.
        kind: the class of the new weight.

    Raises:
        UserError: the weight is quantized already.
    """
    stored = dense_weight(weight)
    parts = codes.to(stored.device), centroids.to(stored), tuple(stored.shape), centroid_bits
    of_rows = None if scales is None else scales.to(stored)
    quantized = kind(*parts, None, codebook, is_multiplied(weight), of_rows)
    swap_in(weight, quantized)
    return quantized


def _times(products: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """products * scales + bias, (..., O) with (O,); in place, but in a graph: nobody else has the products yet."""
    out = None if in_graph() else products
    return torch.mul(products, scales, out=out) if bias is None else torch.addcmul(bias, products, scales, out=out)
