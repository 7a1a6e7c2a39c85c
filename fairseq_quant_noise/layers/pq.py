"""A weight as a codebook and codes:  W_hat[block i] = centroids[codes[i]]     (arXiv 2004.07320, equation 3).

Several weights may share one codebook: they hold the same Parameter, and in a state the same codebook number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..accounting import pq_bytes
from ..errors import UserError
from ..kernels import SETTLED, Prepared, decode, in_graph
from ..scalar import Affine, fake_quantize, fit_affine, is_affine
from ..utils.bits import MOST_CENTROIDS, code_bits, code_dtype, largest_code, unpack_bits
from ..weights.discovery import Weight
from .lookup import Lookup
from .parts import AFFINE, CENTROID_BITS, CENTROIDS, CODEBOOK, CODES, FILE_AFFINE, LATENT_WEIGHT
from .pq_products import PQProducts
from .quantized import dense_weight, is_multiplied, swap_in
from .registry import QuantizedTensor, register

_DERIVED = ("_all_codes", "_in_bytes")  # attributes of rounded centroids: what the CPU's kernels keep of them


@register("pq")
class PQWeight(PQProducts):
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
    """

    scheme = "pq"
    plan_schemes: tuple[str, ...] = (scheme,)
    file_schemes: tuple[str, ...] = (scheme,)
    entries: tuple[str, ...] = (CODES, CENTROIDS, CENTROID_BITS, CODEBOOK, FILE_AFFINE)
    needs: tuple[str, ...] = (CODES, CENTROIDS)
    file_parts = (CODES, CENTROIDS, AFFINE)
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
        if centroid_bits != 16:  # so that checkpoints with fp16 centroids hold codes and centroids alone
            bits = torch.tensor(centroid_bits, dtype=torch.uint8, device=codes.device)
            self.register_buffer(CENTROID_BITS, bits)
        self.bits = centroid_bits
        self._prepared: Prepared | None = None  # for products on a CPU
        self._stored: tuple[Tensor, Tensor] | None = None  # (centroids at the last call, their fp16 or int8 rounding)
        self.shape = torch.Size(shape)

    codes: Tensor
    file_affine: Tensor | None

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
        """What is in memory beside codes and centroids.

        For look-ups two (K, d); with the CPU's kernels (256, d), (d, 256) too, and of a small weight the numbers (O, I)
        in float16 once it has been multiplied by a few rows (`kernels/prepared.py`).
        """
        stored, panel = self._stored or (), self._prepared and self._prepared.panel
        tables = (t for name in _DERIVED for of in stored[1:] for t in getattr(of, name, ()))
        return [*stored, *tables, *([] if panel is None else [panel])]

    def _rounded(self) -> Tensor:
        if self.bits == 16:
            return self.centroids.half().to(self.centroids.dtype)
        return fake_quantize(self.centroids, self.affine())

    def decode(self) -> Tensor:
        """The dense weight, of `shape` (rows, …); in eval mode of the centroids as the file holds them.

        So scores agree. In training, 8-bit centroids are seen rounded too, with straight-through gradients.
        """
        if not self.training and not torch.is_grad_enabled():
            return decode(self.codes, self.stored_centroids()).view(self.shape)
        codes = self.codes.flatten().long()
        if self.training:
            seen = self.centroids.detach() if self.bits == 16 else self.stored_centroids()
            count = torch.stack([user.count() for user in self.users]).sum(0).clamp_(min=1)  # (K, 1)
            latent = self._parameters.get(LATENT_WEIGHT)
            return Lookup.apply(self.centroids, seen, codes, count, latent).view(self.shape)  # type: ignore[no-untyped-call]
        return self.stored_centroids().index_select(0, codes).view(self.shape)

    def count(self) -> Tensor:
        """Blocks of each centroid in this weight: (K, 1)."""
        codes, kept = self.codes, self._counted
        if kept is None or kept[0] is not codes or kept[1] != codes._version:
            count = torch.bincount(codes.flatten().long(), minlength=self.n_centroids).unsqueeze(1)  # (K, 1)
            self._counted = kept = codes, codes._version, count
        return kept[2]

    def centroids_in_bytes(self) -> tuple[Tensor, Tensor]:
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
        found = self.stored_centroids().index_select(0, self.codes[numbers.flatten()].flatten().long())
        return found.view(*numbers.shape, *self.shape[1:])

    def facts(self) -> dict[str, Any]:
        """d, K and the bits of a centroid's numbers."""
        return {"block_size": self.block_size, "n_centroids": self.n_centroids, "centroid_bits": self.bits}

    def parts(self) -> dict[str, Tensor]:
        """Codes (rows, blocks a row), centroids (K, d) in fp16 or uint8, scale and zero point (2, 1) of the latter."""
        if self.bits == 16:
            return {CODES: self.codes, CENTROIDS: self.centroids.half()}
        affine = self.affine()
        return {CODES: self.codes, CENTROIDS: affine.codes(self.centroids), AFFINE: affine.to_tensor()}

    def pack(self, entry: QuantizedTensor) -> dict[str, Tensor]:
        """`parts` with codes packed, (bytes,); the codes alone where another tensor of the file has the codebook."""
        parts = super().pack(entry)
        return parts if entry.codebook is None else {CODES: parts[CODES]}

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
        codes, centroids = parts[CODES], parts[CENTROIDS]
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
        )
        new.prepare(parts)
        swap_in(weight, new)
        return True

    def takes(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether it has a place for each of the `parts` of a state, such as codes (rows, blocks a row)."""
        codebook = int(parts[CODEBOOK]) if CODEBOOK in parts else None
        there = self.bits, self.file_affine is None, self.codebook_number
        return there == (int(parts.get(CENTROID_BITS, 16)), parts.get(FILE_AFFINE) is None, codebook)

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
        """The weight as a matrix (rows, row length), from the centroids as the file holds them."""
        bits, affine = int(parts.get(CENTROID_BITS, 16)), parts.get(FILE_AFFINE)
        return PQWeight(parts[CODES], parts[CENTROIDS], cls.dense_shape(parts), bits, affine).eval().decode()

    @classmethod
    def dense_shape(cls, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """(rows, row length)."""
        codes, centroids = parts[CODES], parts[CENTROIDS]
        return codes.shape[0], codes.numel() // codes.shape[0] * centroids.shape[1]

    @classmethod
    def describes(cls, entry: QuantizedTensor) -> bool:
        """Whether it has d, K (at most 4096) and centroids of 8 or 16 bits."""
        k_fits = entry.n_centroids in range(MOST_CENTROIDS + 1)
        return k_fits and entry.block_size is not None and entry.centroid_bits in (8, 16)

    @classmethod
    def code_bits(cls, entry: QuantizedTensor) -> int:
        """Bits of a code: log2 K, rounded up (at least 1)."""
        return code_bits(entry.n_centroids or 1)

    @classmethod
    def size(cls, entry: QuantizedTensor) -> float:
        """Bytes: log2 K bits a code, plus the centroids (fp16 or int8) for the tensor that has the codebook."""
        bits = 0 if entry.codebook else entry.centroid_bits
        return pq_bytes(entry.n_codes, entry.block_size or 1, entry.n_centroids or 1, bits)

    @classmethod
    def file_types(cls, entry: QuantizedTensor) -> dict[str, torch.dtype]:
        """Codes (bytes,); with its own codebook centroids (K, d), fp16, or uint8 with scale and zero point (2, 1)."""
        if entry.codebook is not None:
            return {CODES: torch.uint8}
        if entry.centroid_bits == 16:
            return {CODES: torch.uint8, CENTROIDS: torch.float16}
        return {CODES: torch.uint8, CENTROIDS: torch.uint8, AFFINE: torch.float32}

    @classmethod
    def wrong(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor]) -> str | None:
        """What is wrong with d, codes (bytes,), centroids (K, d) or scale and zero point (2, 1), or None."""
        if math.prod(entry.shape[1:]) % (entry.block_size or 1) or entry.channels != 1:
            return "block size or channels"
        if not entry.holds(parts[CODES]):
            return "codes' shape"
        if AFFINE in parts and not is_affine(parts[AFFINE], entry.channels, entry.centroid_bits):
            return "scales or zero points"
        k, centroids = entry.n_centroids or 0, parts.get(CENTROIDS)
        if centroids is not None and tuple(centroids.shape) != (k, entry.block_size):
            return "centroids' shape"
        if k < 2**entry.code_bits and largest_code(parts[CODES], entry.n_codes, entry.code_bits) >= k:
            return f"a code beyond its {k} centroids"
        if centroids is not None and centroids.is_floating_point() and not bool(torch.isfinite(centroids).all()):
            return "a centroid that is not finite"
        return None

    @classmethod
    def unpack(cls, entry: QuantizedTensor, parts: Mapping[str, Tensor], codebook: int | None) -> dict[str, Tensor]:
        """Codes (rows, blocks a row) as in memory; centroids (K, d) in fp32; and how the file has the centroids."""
        state = {CODES: unpack_bits(parts[CODES], entry.n_codes, entry.code_bits).view(entry.shape[0], -1)}
        if codebook is not None:
            state[CODEBOOK] = torch.tensor(codebook, dtype=torch.int32)
        if entry.centroid_bits == 16:
            return state | {CENTROIDS: parts[CENTROIDS].float()}
        return state | {
            CENTROIDS: Affine.of_tensor(parts[AFFINE], entry.centroid_bits).decode(parts[CENTROIDS]),
            FILE_AFFINE: parts[AFFINE],
            CENTROID_BITS: torch.tensor(entry.centroid_bits, dtype=torch.uint8),
        }


P = TypeVar("P", bound=PQWeight)


def quantize_weight_(
    weight: Weight,
    codes: Tensor,
    centroids: Tensor,
    centroid_bits: int = 16,
    codebook: int | None = None,
    kind: type[P] = PQWeight,  # type: ignore[assignment]
) -> P:
    """Put codes and centroids in the place of a stored weight, for its owner and every alias; returns the new weight.

    Args:
        weight: a weight of the model, not quantized yet.
        codes: (rows, blocks a row) uint8, or int32 where K is above 256.
        centroids: (K, d), taken in the dtype of the stored weight.
        centroid_bits: 16 (fp16) or 8 (int8).
        codebook: the number of a shared one.
        kind: the class of the new weight.

    Raises:
        UserError: the weight is quantized already.
    """
    stored = dense_weight(weight)
    parts = codes.to(stored.device), centroids.to(stored)
    quantized = kind(*parts, tuple(stored.shape), centroid_bits, None, codebook, is_multiplied(weight))
    swap_in(weight, quantized)
    return quantized
