"""Which parameters are attention projections, by the names that models give them."""

import re
from collections.abc import Iterable

from torch import nn

from .names import canonical_name

# What a projection is called in its attention module. Where query, key and value are one matrix, it is a key's too.
_KEY_VALUE = (
    r"(?:layout_)?(?:k|v|kv|key|value|keys_values|query_key)"
    r"(?:_(?:proj|lin|head|global|a_proj|a_proj_with_mqa|b_proj|proj_current|proj_delayed|proj_compressed))?"
    r"|(?:to|linear|project|projection)_(?:k|v|kv|key|value)|w[kv]"
    r"|(?:in_proj_|w)?qkvz?(?:_proj)?|query_key_value|queries_keys_values|c_attn|in_proj"
)
_QUERY = (
    r"(?:\w+_)?query(?:_proj|_global)?|queries|q(?:_(?:proj|lin|head|attn|a_proj|b_proj))?"
    r"|(?:to|linear|project|projection)_(?:q|query)|wq|receptance"
)
_OUTPUT = (
    r"(?:layout_)?output(?:\.dense)?|dense|attention_out|o|w?o(?:_proj)?|(?:out|post|c)_proj|o_[ab]_proj|out_lin|proj"
    r"|proj_out|projection|projection_layer|linear_out|to_out"
)
_SQUEEZEBERT_OUTPUT = r"post_attention/conv1d"  # beside its attention module, and named after nothing else
# What may come behind: a wrapper's own name, or PEFT's (base_layer, lora_A.default, ...).
_INNER = r"(?:\.(?:linear|convolution))?"
_ADAPTER = (
    r"(?:\.base_layer)*(?:\.(?:lora|ia3|vera|hada|lokr|oft|boft|fourierft|hra|vblora|bone|miss|randlora|road|delora|"
    r"shira|c3a|waveft|gralora|poly|adalora)_\w*(?:\.\w+)*)?"
)


def _pattern(*roles: str) -> re.Pattern:
    # "self." is BERT's; a number is that of one attention of several; qkv_proj and attention hold single projections
    below = r"[^/]*/(?:(?:self|attention|attn|qkv_proj|\d+)\.)*"
    projection = f"(?:{below}(?:{'|'.join(roles)}){_INNER}|{_SQUEEZEBERT_OUTPUT})"
    return re.compile(f"{projection}{_ADAPTER}(?:[._](?:weight|bias))?", re.IGNORECASE)


_ROLES = {
    "attention": _pattern(_KEY_VALUE, _OUTPUT),
    "attention+query": _pattern(_KEY_VALUE, _OUTPUT, _QUERY),
}
ATTENTION = tuple(_ROLES)


def attention_projections(model: nn.Module, names: Iterable[str], targets: str) -> set[str]:
    """Those of the parameters called ``names`` that ``targets`` ("attention" or "attention+query") means.

    An attention module is one whose name or class speaks of attention; its projections are told by their names.
    """
    scopes = set()
    for name, module in model.named_modules():
        called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if "att" in called and "bottleneck" not in called:  # MobileBERT has one before its attention
            scopes.add(canonical_name(name))
    return {name for name in names if _is_projection(name, scopes, _ROLES[targets])}


def _is_projection(name: str, scopes: set[str], role: re.Pattern) -> bool:
    parts = name.split(".")
    return any(
        ".".join(parts[:i]) in scopes and role.fullmatch(f"{parts[i - 1]}/{'.'.join(parts[i:])}")
        for i in range(1, len(parts))
    )
