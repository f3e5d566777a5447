"""The allow-list: every operation, attribute, keyword and dtype that an uploaded loss may name.

Knows names only, and how the SDK spells them. Does not know torch: what is behind a name is in
engine/graph_operations.py, and a test holds the two together. Left out on purpose: whatever changes its
input, draws at random, leaves memory uninitialised, reads it by stride, or has a result of unbounded size.
"""

from __future__ import annotations

from twinkle_serve.protocol.errors import UserError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One result element for each element of the arguments' common shape.
ELEMENTWISE = _words(
    """
    abs add sub mul div true_divide floor_divide remainder fmod pow float_power neg negative reciprocal
    sign exp exp2 expm1 log log2 log10 log1p logaddexp sqrt rsqrt square sigmoid tanh sin cos atan atan2
    erf erfc lgamma digamma xlogy expit logit minimum maximum fmin fmax clamp clamp_min clamp_max clip
    where masked_fill nan_to_num relu silu gelu softplus log_sigmoid elu leaky_relu hardtanh lerp round
    floor ceil trunc eq ne lt le gt ge isfinite isnan isinf logical_and logical_or logical_not
    logical_xor bitwise_and bitwise_or bitwise_not isclose detach clone contiguous float double long int
    bool cpu mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy_with_logits
    cosine_similarity
    """
)

# At most as many result elements as the largest argument has.
SHRINKING = _words(
    """
    sum mean prod std var amax amin argmax argmin any all count_nonzero logsumexp softmax log_softmax
    cumsum cumprod logcumsumexp norm dot sort argsort topk flip roll reshape view flatten unflatten
    squeeze unsqueeze transpose permute t select narrow zeros_like ones_like full_like numel size dim
    normalize median nansum nanmean tril triu to type_as
    """
)

# The size is told by the arguments' values or shapes in a way of its own.
GROWING = _words(
    """
    zeros ones full new_zeros new_ones new_full arange expand expand_as broadcast_to repeat tile cat
    concat stack outer matmul mm mv bmm gather index_select pad diff max min
    """
)

OPERATORS = _words(
    """
    add sub mul truediv floordiv mod pow neg pos abs getitem lt le gt ge eq ne and_ or_ xor invert
    matmul
    """
)
MATH = _words(
    """
    exp log log2 log10 log1p expm1 sqrt pow floor ceil fabs isfinite isnan tanh sin cos erf lgamma
    """
)
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "values", "indices"})
KEYWORDS = _words(
    """
    input other dim dims dim0 dim1 keepdim dtype device layout memory_format min max exponent alpha
    value weight reduction size_average reduce descending stable largest sorted k n shifts size shape
    start end step length index mask unbiased correction p ord beta delta threshold negative_slope
    min_val max_val inplace approximate eps nan posinf neginf rtol atol equal_nan rounding_mode tensors
    fill_value sections split_size chunks diagonal pad mode target log_target pos_weight ddof repeats x1
    x2 tensor tensor1 tensor2 start_dim end_dim _stacklevel decimals
    """
)
TEXTS = frozenset({"none", "sum", "mean", "batchmean", "floor", "trunc", "constant", "tanh", "fro"})
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
TENSOR_OPERATIONS = ELEMENTWISE | SHRINKING | GROWING

MODULES = ("torch", "torch.nn.functional", "torch._C._nn", "torch.special", "torch.functional")
_ALIASES = {
    "logsigmoid": "log_sigmoid",
    "absolute": "abs",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "swapaxes": "transpose",
}


def find_operation(op: object, target: object, where: str) -> tuple[str, str]:
    """The kind ("function", "method", "operator", "math" or "attribute") and plain name of what a node
    calls. Raises UserError when it is not on the list."""
    if not isinstance(target, str) or len(target) > 200:
        raise UserError(f"{where}.target must be text of at most 200 characters")
    if op == "call_function":
        if target in ("getattr", "builtins.getattr"):
            return "attribute", "getattr"
        module, _, name = target.rpartition(".")
        if module in ("operator", "_operator") and name in OPERATORS:
            return "operator", name
        if module == "math" and name in MATH:
            return "math", name
        if module == "torch._C._special":
            module, name = "torch.special", name.removeprefix("special_")
        name = _ALIASES.get(name, name)
        if module in MODULES and name in TENSOR_OPERATIONS:
            return "function", f"{module}.{name}"
    elif op == "call_method":
        name = _ALIASES.get(target, target)
        if name in TENSOR_OPERATIONS:
            return "method", name
    else:
        raise UserError(f"{where}: op {op!r:.40} is not served; call_function and call_method are")
    raise UserError(
        f"{where}: {target!r} is not served in an uploaded loss. Served are elementwise arithmetic, "
        "comparisons, reductions, shape changes, sorting and indexing of torch, torch.nn.functional, "
        "operator and math, without in-place forms, random numbers and uninitialised memory"
    )
