"""Linear operators A on images [N,H,W,C], of which a damaged image y = A x (+ noise) is made.

For `editing.restore`, which needs three functions of an operator: A, its pseudoinverse A^+, and the
inverse of r2 A A^T + n2 I.

The closed forms of compositions follow from two facts. Where A_1 A_1^T = c I, the pseudoinverse
of A_2 A_1 is A_1^+ A_2^+ and the product with its transpose c A_2 A_2^T; `downscale` and `grey`
are such A_1. And `grey` acts on the channels and the others on the pixels, so they commute. In
general (A_2 A_1)^+ is not A_1^+ A_2^+.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ddpm_jax.errors import UserError, shown
from ddpm_jax.shapes import Array, Float, Shaped

Images = Float[Array, "b h w c"]

REC_601 = np.array([0.299, 0.587, 0.114], np.float32)
"""The weights of red, green and blue in grey (Rec. 601); they sum to 1."""

CUT = 1e-3
"""`blur` drops the frequencies whose gain is below this part of the largest."""


@runtime_checkable
class Operator(Protocol):
    """What `editing.restore` needs of a linear operator: three functions."""

    def A(self, x: Images) -> Images:
        """A x of images x [N,H,W,C]: [N,h,w,c]."""

    def pinv(self, y: Images) -> Images:
        """A^+ y of y [N,h,w,c]: [N,H,W,C]."""

    def solve(self, r2: float | Array, n2: float) -> Callable[[Images], Images]:
        """The function u [N,h,w,c] -> (r2 A A^T + n2 I)^-1 u; `r2` is a number or [N,1,1,1]."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageOperator:
    """Grey, then means over blocks, then a mask or a blur: each stage may be absent.

    Made by `downscale`, `grey`, `mask` and `blur`, and put together by `after @ before`. Equal and
    hashable by its content, so it can be a static argument of jax.jit; it is a pytree too, whose
    leaves are the mask and the kernels, so as an ordinary argument no mask compiles anew.
    """

    factor: int = 1
    """Blocks have factor x factor pixels."""
    greyed: bool = False
    known: Any = None
    """The mask, bool [1 or N,h,w,1], True where pixels are kept; None for no mask."""
    kernels: tuple[Any, ...] = ()
    """Of blurs, float32 [rows, columns] each."""

    def A(self, x: Float[Array, "b H W C"]) -> Float[jax.Array, "b h w c"]:
        """A x of images x [N,H,W,C]: [N,h,w,c].

        Raises UserError where images of this size or so many channels do not fit the operator.
        """
        x = jnp.asarray(x)
        if self.greyed:
            _check_channels(x, REC_601.size, "images of 3 channels")
            x = jnp.sum(x * REC_601.reshape(1, 1, 1, -1), axis=-1, keepdims=True)
        if self.factor > 1:
            x = _block_means(x, self.factor)
        return self._last(x, lambda spectrum: spectrum)

    def pinv(self, y: Float[Array, "b h w c"]) -> Float[jax.Array, "b H W C"]:
        """A^+ y of y [N,h,w,c]: [N,H,W,C], the smallest x that comes nearest to A x = y.

        Of a mean over blocks it is repetition, of grey with weights w it is w / |w|^2, and of a
        mask the mask itself. Raises UserError as `A` does.
        """
        x = self._last(jnp.asarray(y), _reciprocal)
        for axis in (1, 2):
            x = jnp.repeat(x, self.factor, axis=axis)
        if self.greyed:
            _check_channels(x, 1, "a y of 1 channel")
            x = x * (REC_601 / (REC_601 @ REC_601)).reshape(1, 1, 1, -1)
        return x

    def solve(self, r2: float | Float[Array, "..."], n2: float) -> Callable[[Images], Images]:
        """The function u [N,h,w,c] -> (r2 A A^T + n2 I)^-1 u; `r2` is a number or [N,1,1,1]."""
        scale = r2 * self._row_norm

        def inverse(u: Images) -> Images:
            if self.known is not None:
                return u / (scale * self._mask_of(u) + n2)
            if not self.kernels:
                return u / (scale + n2)
            gain = jnp.square(jnp.abs(self._spectrum_of(u)))
            return _filtered(u, 1 / (scale * gain + n2))

        return inverse

    def __matmul__(self, before: "ImageOperator") -> "ImageOperator":
        """The composition: `before` acts first. Raises UserError where it has no closed form."""
        if not isinstance(before, ImageOperator):
            return NotImplemented
        if self.greyed and before.greyed:
            raise UserError("grey: an image is made grey once; leave the second grey out")
        if self.factor > 1 and (before.known is not None or before.kernels):
            self._refuse(before)
        if (self.known is not None and before.kernels) or (
            self.kernels and before.known is not None
        ):
            self._refuse(before)
        masks = [each.known for each in (self, before) if each.known is not None]
        return ImageOperator(
            self.factor * before.factor,
            self.greyed or before.greyed,
            None if not masks else masks[0] if len(masks) == 1 else masks[0] & masks[1],
            self.kernels + before.kernels,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageOperator) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @property
    def _content(self) -> tuple:
        arrays = [np.asarray(each) for each in jax.tree.leaves((self.known, self.kernels))]
        whole = tuple((each.shape, each.tobytes()) for each in arrays)
        return self.factor, self.greyed, self.known is None, whole

    @property
    def _row_norm(self) -> float:
        """c of A A^T = c I, for the stages before the last."""
        return (float(REC_601 @ REC_601) if self.greyed else 1.0) / self.factor**2

    @property
    def _name(self) -> str:
        stages = {
            "mask": self.known is not None,
            "blur": bool(self.kernels),
            "downscale": self.factor > 1,
            "grey": self.greyed,
        }
        return " after ".join(name for name, there in stages.items() if there)

    def _refuse(self, before: "ImageOperator") -> None:
        raise UserError(
            f"operator: {self._name} after {before._name} has no known A^+; a mask or a blur comes "
            "last, and not both: compose them in another order, or leave one out"
        )

    def _last(self, x, of_spectrum):
        """The mask or the blur, its spectrum changed by `of_spectrum`."""
        if self.known is not None:
            return jnp.where(self._mask_of(x), x, 0.0)
        return _filtered(x, of_spectrum(self._spectrum_of(x))) if self.kernels else x

    def _mask_of(self, x):
        if self.known.shape[1:3] != x.shape[1:3] or self.known.shape[0] not in (1, x.shape[0]):
            raise UserError(
                f"mask: has the shape {self.known.shape}, and the images that it is put on "
                f"{x.shape}; give it their height and width, and one mask or one for each image"
            )
        return self.known

    def _spectrum_of(self, x):
        """The product of the kernels' spectra [1,h,w/2+1,1], 0 where it is cut."""
        size = x.shape[1:3]
        spectrum = jnp.float32(1)
        for kernel in self.kernels:
            if kernel.shape[0] > size[0] or kernel.shape[1] > size[1]:
                raise UserError(
                    f"blur: the kernel has the shape {kernel.shape}, larger than images of "
                    f"{size[0]} x {size[1]} pixels; choose a smaller one"
                )
            spectrum = spectrum * jnp.fft.rfft2(_at_origin(kernel, size))
        gain = jnp.abs(spectrum)
        return jnp.where(gain >= CUT * jnp.max(gain), spectrum, 0.0)[None, :, :, None]


jax.tree_util.register_dataclass(
    ImageOperator, data_fields=["known", "kernels"], meta_fields=["factor", "greyed"]
)


def downscale(factor: int) -> ImageOperator:
    """The means over blocks of factor x factor pixels. Raises UserError for a factor below 1."""
    if isinstance(factor, bool) or not isinstance(factor, int | np.integer) or factor < 1:
        raise UserError(
            f"downscale: the factor must be a whole number of at least 1, got {shown(factor)}"
        )
    return ImageOperator(factor=int(factor))


def grey() -> ImageOperator:
    """The grey image [N,H,W,1] of a coloured one, with the weights of Rec. 601."""
    return ImageOperator(greyed=True)


def mask(known: Shaped[Array, "..."]) -> ImageOperator:
    """The image with 0 where pixels are unknown.

    `known` is [H,W], [H,W,1] or [N,H,W,1], bool or float: pixels above 1/2 are known. Raises
    UserError for other shapes.
    """
    shape = np.shape(known)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) == 3:
        shape = (1, *shape)
    if len(shape) != 4 or shape[-1] != 1:
        raise UserError(
            f"mask: must have the shape [H,W], [H,W,1] or [N,H,W,1], got {np.shape(known)}"
        )
    return ImageOperator(known=is_known(known).reshape(shape))


def is_known(mask: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`mask`, bool or float, as bool: True above 1/2."""
    return mask if mask.dtype == bool else mask > 0.5


def blur(kernel: Float[Array, "..."]) -> ImageOperator:
    """The circular convolution of each channel with `kernel` [rows, columns].

    Its centre is kernel[rows // 2, columns // 2]. Frequencies whose gain is below CUT of the
    largest are dropped, from A as from A^+: what such a blur leaves of them is below any noise.
    Raises UserError for a kernel of another rank, or one that is not finite or zero all over.
    """
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim != 2 or not kernel.any() or not math.isfinite(kernel.sum()):
        raise UserError(
            "blur: the kernel must be finite numbers [rows, columns], not all of them 0; got the "
            f"shape {kernel.shape}"
        )
    return ImageOperator(kernels=(kernel,))


def _check_channels(x, channels, needed):
    if x.shape[-1] != channels:
        raise UserError(f"grey: needs {needed}, got {x.shape[-1]}; leave grey out")


def _block_means(x, factor):
    b, h, w, c = x.shape
    if h % factor or w % factor:
        raise UserError(
            f"downscale: images of {h} x {w} pixels have no whole blocks of {factor} x {factor}; "
            "choose a factor that divides both"
        )
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean(axis=(2, 4))


def _at_origin(kernel, size):
    """The kernel as an image of `size` whose centre lies at the first pixel."""
    rows, columns = kernel.shape
    image = jnp.pad(kernel, ((0, size[0] - rows), (0, size[1] - columns)))
    return jnp.roll(image, (-(rows // 2), -(columns // 2)), axis=(0, 1))


def _reciprocal(spectrum):
    """1 / spectrum, and 0 where it is cut."""
    there = spectrum != 0
    return jnp.where(there, 1 / jnp.where(there, spectrum, 1.0), 0.0)


def _filtered(x, spectrum):
    """x [N,h,w,c] with its frequencies multiplied by `spectrum` [1 or N,h,w/2+1,1]."""
    frequencies = jnp.fft.rfft2(x, axes=(1, 2))
    return jnp.fft.irfft2(frequencies * spectrum, x.shape[1:3], axes=(1, 2))
