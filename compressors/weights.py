"""Weights: which parameters of a network are matrices, and along which dimensions.

Nearly all parameters are entries of matrices that activations are multiplied by: of Linear and
convolution layers, embeddings, recurrent gates, fused experts, and modules of classes that nobody
has heard of. The others are few and sensitive: biases, norms, and learned positions.
"""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

__all__ = [
    "BIAS_OR_NORM",
    "POSITIONS",
    "TOKEN",
    "TRANSPOSED",
    "Matrices",
    "conv1d_class",
    "detach_computed_",
    "is_conv1d",
    "is_multiplied",
    "is_product",
    "is_statistic",
    "matrices_of",
    "no_weight",
    "owner",
    "twin_of",
]

# Layers whose weights have output channels as their second dimension.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Layers that compute with their weight, whatever the network calls them.
_COMPUTING = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

# Matrices along the first dimension of a recurrent weight: input, forget, cell and output gate, ...
_GATES = {
    nn.RNN: 1, nn.RNNCell: 1, nn.GRU: 3, nn.GRUCell: 3, nn.LSTM: 4, nn.LSTMCell: 4,
}  # fmt: skip
_RECURRENT = re.compile(r"weight_[ih]h(_l\d+)?(_reverse)?")

# Reasons why a parameter is not the weight of a layer.
BIAS_OR_NORM, POSITIONS, TOKEN = "a bias or a norm", "learned positions", "a learned token"

# Words in the name of a parameter or of an embedding layer.
_POSITION = re.compile(r"(^|_)(pos|positions?|positional|rel|relative|distance|wpe)(_|$)")
_TOKEN = re.compile(r"(^|_)tokens?$")
_BIAS = re.compile(r"(^|_)bias(_|$)")
_NORM = re.compile(r"Norm(Act)?(\dd)?$")

# Suffixes that ``nn.utils.weight_norm`` and ``nn.utils.spectral_norm`` give to the name of a weight
# that they compute.
_COMPUTED = ("_v", "_orig")


@dataclass(frozen=True)
class Matrices:
    """The dimensions of a parameter: one matrix of outputs and inputs, or a stack of them.

    Args:
        layer: Name of the layer that multiplies by it.
        outputs: Dimension of the outputs.
        inputs: Dimension of the inputs.
        parts: Number of matrices that stand one after the other along dimension 0, such as gates;
            None if dimension 0 counts the matrices itself, as of fused experts.
        normed: Dimension whose slices the layer divides by their norms, as weight norm does; a
            slice of zeros would make NaN. None for all others.

    Example:
        >>> lstm = nn.LSTM(input_size=5, hidden_size=3)
        >>> form = matrices_of(lstm, "weight_ih_l0")
        >>> form.split(lstm.weight_ih_l0).shape, form.scale_shape((12, 5), "tensor")
        (torch.Size([4, 3, 5]), (4, 1))
    """

    layer: str
    outputs: int = 0
    inputs: int = 1
    parts: int | None = 1
    normed: int | None = None

    def split(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as (matrices, outputs, inputs, kernel ...).

        A parameter of fewer than two dimensions has no inputs.
        """
        if self.parts is None:
            return tensor.movedim((self.outputs, self.inputs), (1, 2))
        if tensor.dim() >= 2:
            tensor = tensor.movedim((self.outputs, self.inputs), (0, 1))
        return tensor.unsqueeze(0) if self.parts == 1 else tensor.unflatten(0, (self.parts, -1))

    def join(self, matrices: Tensor) -> Tensor:
        """Return what :meth:`split` was given."""
        if self.parts is None:
            return matrices.movedim((1, 2), (self.outputs, self.inputs))
        tensor = matrices.squeeze(0) if self.parts == 1 else matrices.flatten(0, 1)
        if tensor.dim() >= 2:
            tensor = tensor.movedim((0, 1), (self.outputs, self.inputs))
        return tensor

    def num_matrices(self, shape: Sequence[int]) -> int:
        """Return the number of matrices in a parameter of this shape."""
        return shape[0] if self.parts is None else self.parts

    def matrix_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of one matrix: outputs, inputs, kernel ...

        Example:
            >>> Matrices("conv", outputs=1, inputs=0).matrix_shape(torch.Size([8, 4, 3, 3]))
            torch.Size([4, 8, 3, 3])
        """
        return self.split(torch.empty(shape, device="meta")).shape[1:]

    def scale_shape(self, shape: Sequence[int], granularity: str | int) -> tuple[int, ...]:
        """Return the number of quantization scales along each dimension of the parameter.

        Args:
            shape: Shape of the parameter.
            granularity: ``"channel"``: a scale for each output channel of each matrix;
                ``"tensor"``: for each matrix, but for each channel of weight norm, which divides by
                its norm; or the size of groups of inputs of a channel.

        Raises:
            ValueError: Groups do not divide the inputs.

        Example:
            >>> experts = Matrices("experts", outputs=1, inputs=2, parts=None)
            >>> experts.scale_shape((8, 64, 32), "channel"), experts.scale_shape((8, 64, 32), 16)
            ((8, 64, 1), (8, 64, 2))
        """
        scales = [1] * len(shape)
        if not shape:
            return ()
        scales[0] = self.num_matrices(shape)
        if granularity != "tensor" or self.normed == self.outputs:
            scales[self.outputs] = shape[self.outputs]
        if isinstance(granularity, int):
            if len(shape) < 2 or shape[self.inputs] % granularity:
                raise ValueError(
                    f"groups of {granularity} do not divide a weight of shape {tuple(shape)}: "
                    "choose another size, or granularity='channel'"
                )
            scales[self.inputs] = shape[self.inputs] // granularity
        return tuple(scales)


def matrices_of(module: nn.Module, name: str) -> Matrices:
    """Return the dimensions of a parameter of a module, by the class of its layer.

    Example:
        >>> matrices_of(nn.ConvTranspose2d(8, 4, 3), "weight")
        Matrices(layer='', outputs=1, inputs=0, parts=1, normed=None)
    """
    return replace(_form(module, name), normed=_normed_axis(module, name))


def _form(module: nn.Module, name: str) -> Matrices:
    path, layer, own = owner(module, name)
    parameter = module.get_parameter(name)
    dimensions = 0 if is_lazy(parameter) else parameter.dim()
    if isinstance(layer, TRANSPOSED) or (is_conv1d(layer) and dimensions == 2):
        return Matrices(path, outputs=1, inputs=0)
    if isinstance(layer, nn.MultiheadAttention) and own == "in_proj_weight":
        return Matrices(path, parts=3)
    gates = [number for kind, number in _GATES.items() if isinstance(layer, kind)]
    if gates and _RECURRENT.fullmatch(own):
        return Matrices(path, parts=gates[0])
    if dimensions == 3 and not isinstance(layer, _COMPUTING):
        if getattr(layer, "is_transposed", False):  # as fused experts of Hugging Face say
            return Matrices(path, outputs=2, inputs=1, parts=None)
        return Matrices(path, outputs=1, inputs=2, parts=None)
    return Matrices(path)


def no_weight(module: nn.Module, name: str) -> str | None:
    """Return the reason why a parameter is not the weight of a layer, or None if it is one.

    Example:
        >>> net = nn.TransformerEncoderLayer(8, 2)
        >>> no_weight(net, "norm1.weight"), no_weight(net, "self_attn.in_proj_weight")
        ('a bias or a norm', None)
    """
    path, layer, own = owner(module, name)
    parameter = module.get_parameter(name)
    computes = isinstance(layer, _COMPUTING) and own == "weight"
    embeds = isinstance(layer, nn.Embedding | nn.EmbeddingBag) and own == "weight"
    vector = not is_lazy(parameter) and sum(size > 1 for size in parameter.shape) < 2
    if vector and (name.endswith("original0") or not (computes or embeds)):  # the norms of rows
        return BIAS_OR_NORM
    if not computes:
        kind = type(layer).__name__
        named = own != "weight" or embeds or "Embedding" in kind  # or the layer computes with it
        word = path.rpartition(".")[2] if own == "weight" else own
        if _NORM.search(kind) or (named and _BIAS.search(word)):
            return BIAS_OR_NORM
        if "Position" in kind or (named and _POSITION.search(word)):
            return POSITIONS
        if own != "weight" and _TOKEN.search(word):
            return TOKEN
    return None


def _normed_axis(module: nn.Module, name: str) -> int | None:
    """Return the dimension whose slices a layer divides by their norms, or None.

    Weight norm does so (Salimans and Kingma, 2016): ``w = g v / ||v||``, with a norm for each slice
    of ``v`` and entry of ``g``.
    """
    path, _, last = name.rpartition(".")
    siblings = dict(module.get_submodule(path).named_parameters(recurse=False))
    for own, other in (("original1", "original0"), ("_v", "_g")):
        factors = siblings.get(last.removesuffix(own) + other) if last.endswith(own) else None
        if factors is not None and factors.dim() == siblings[last].dim():
            sizes = zip(factors.shape, siblings[last].shape, strict=True)
            return next(
                (k for k, (n, size) in enumerate(sizes) if n == size == factors.numel()), None
            )
    return None


def owner(module: nn.Module, name: str) -> tuple[str, nn.Module, str]:
    """Return the name of the layer of a parameter, the layer, and its own name of the weight.

    Example:
        >>> net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        >>> path, layer, own = owner(net, "0.parametrizations.weight.original1")
        >>> path, own
        ('0', 'weight')
    """
    path, _, own = name.rpartition(".")
    layer = module.get_submodule(path)
    if isinstance(layer, ParametrizationList):
        path, _, own = path.rpartition(".")
        path = path.rpartition("parametrizations")[0].removesuffix(".")
        return path, module.get_submodule(path), own
    for suffix in _COMPUTED:
        if own.endswith(suffix) and hasattr(layer, own.removesuffix(suffix)):
            own = own.removesuffix(suffix)
    return path, layer, own


def detach_computed_(module: nn.Module) -> None:
    """Detach weights that layers with the old weight norm hold, so that the module can be copied.

    Each forward pass computes them again.
    """
    for layer in module.modules():
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(layer)[name] = value.detach()


def twin_of(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a copy of a module, parameters and all.

    Args:
        module: The module.
        memo: Copies that were made already, by the id of the original, as ``deepcopy`` takes them.

    Raises:
        TypeError: It holds what cannot be copied.
    """
    detach_computed_(module)
    try:
        return deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"{type(module).__name__} cannot be copied, and its outputs are compared with those of "
            f"a copy: {error}. Take what cannot be copied, such as locks, out of it"
        ) from error


def is_statistic(name: str) -> bool:
    """Return whether a tensor is a running mean or variance, by its name.

    Example:
        >>> [name for name in nn.BatchNorm1d(2).state_dict() if is_statistic(name)]
        ['running_mean', 'running_var']
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def conv1d_class(layer: nn.Module) -> type[nn.Module] | None:
    """Return the class ``Conv1D`` of Hugging Face's transformers, if the layer is of it.

    It is a linear layer whose weight is stored as (inputs, outputs).
    """
    named = [kind for kind in type(layer).__mro__ if kind.__name__ == "Conv1D"]
    return named[0] if named and hasattr(layer, "nf") else None


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether a layer is Hugging Face's ``Conv1D``."""
    return conv1d_class(layer) is not None


def is_product(layer: nn.Module) -> bool:
    """Return whether a layer multiplies its input by a weight, with weights for each feature.

    Then multiply-adds count, and an input has a norm for each weight.

    Example:
        >>> is_product(nn.Linear(2, 2)), is_product(nn.Embedding(2, 2))
        (True, False)
    """
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_conv1d(layer)


@torch.no_grad()
def is_multiplied(module: nn.Module, name: str) -> bool:
    """Return whether a layer multiplies by a parameter itself, scaled along one dimension at most.

    Then zeros stay zeros, and levels stay levels. Of ``nn.utils.parametrizations``, weight norm and
    spectral norm only scale; orthogonal ones do not. It is found by trying.

    Example:
        >>> from torch.nn.utils.parametrizations import orthogonal, weight_norm
        >>> is_multiplied(weight_norm(nn.Linear(4, 3)), "parametrizations.weight.original1")
        True
        >>> is_multiplied(orthogonal(nn.Linear(4, 3)), "parametrizations.weight.original")
        False
    """
    path, _, own = name.rpartition(".")
    parametrizations = module.get_submodule(path)
    if not isinstance(parametrizations, ParametrizationList):
        return True
    probe = deepcopy(parametrizations).eval()  # spectral norm learns when it is called in training
    original = probe.get_parameter(own)
    # Half of them zeros, along every dimension.
    numbers = 0.618034 * torch.arange(original.numel(), dtype=torch.double, device=original.device)
    original.copy_((numbers % 1 - 0.5).clamp_min(0).view(original.shape))
    weight = probe().nan_to_num()  # of slices of zeros alone, which weight norm divides by 0
    if weight.shape != original.shape or not torch.equal(weight == 0, original == 0):
        return False
    ratios = weight / original
    return any(_is_constant(ratios.movedim(axis, 0).flatten(1)) for axis in range(ratios.dim()))


def _is_constant(ratios: Tensor) -> bool:
    """Return whether the last dimension holds one number, apart from NaN and rounding."""
    low = ratios.nan_to_num(torch.inf).amin(-1)
    high = ratios.nan_to_num(-torch.inf).amax(-1)
    return bool(((high - low) <= 1e-3 * high.abs()).all())
