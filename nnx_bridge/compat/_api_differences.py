"""The rows of the table of differences for lifted transforms and the rest of Linen's API."""

from __future__ import annotations

from typing import TypeAlias

from nnx_bridge.compat._difference import Difference, Kind, Route, Verdict


def _row(
    kind: Kind,
    linen: str,
    nnx: str | None,
    verdict: Verdict,
    what: str,
    route: Route,
    compat: str | None = None,
    source: str | None = None,
) -> Difference:
    return Difference(linen, nnx, verdict, what, route, kind=kind, compat=compat, source=source)


def _transform(
    name: str, verdict: Verdict, what: str, route: Route, compat: str | None = None
) -> Difference:
    nnx = None if verdict == "missing" else name
    return _row("transform", name, nnx, verdict, what, route, compat)


_DERIVATIVES = (
    _transform(
        "grad",
        "differs",
        "takes the module as an argument to differentiate or close over, and returns no tuple for "
        "one argument; fails on closed-over modules that write",
        "compat",
        "lifted.grad",
    ),
    _transform(
        "value_and_grad",
        "differs",
        "as `grad`",
        "compat",
        "lifted.value_and_grad",
    ),
    _transform(
        "vjp",
        "differs",
        "raises NotImplementedError unless `graph=False`, and has no filter for variables",
        "compat",
        "lifted.vjp",
    ),
    _transform(
        "jvp",
        "differs",
        "raises NotImplementedError unless `graph=False`, and then wants a tangent for every "
        "variable, RNG counts included",
        "compat",
        "lifted.jvp",
    ),
)

_BY_TYPE = "takes Variables by type through `StateAxes`, where Linen names collections and streams"


def _lifted(name: str, verdict: Verdict, what: str, nnx: str | None = None) -> Difference:
    nnx = None if verdict == "missing" else nnx or name
    ours = f"nnx_bridge.{name}"
    return _row("transform", name, nnx, verdict, what, "compat", ours)


_LIFTED = (
    _lifted("vmap", "differs", _BY_TYPE),
    _lifted("scan", "differs", _BY_TYPE),
    _lifted("jit", "differs", "has no `variables` and `rngs`: everything is lifted"),
    _lifted("remat", "differs", "has no `variables` and `rngs`, and takes no module class"),
    _lifted("checkpoint", "differs", "is called `remat` only", nnx="remat"),
    _lifted("while_loop", "differs", "the module is part of the carry"),
    _lifted("cond", "differs", "the module is one of the operands"),
    _lifted("switch", "differs", "the module is one of the operands"),
    _lifted("custom_vjp", "differs", "the backward pass takes gradients of module states"),
    _lifted("map_variables", "missing", "NNX sees no variables through a function"),
    _lifted("remat_scan", "missing", "NNX has `remat` inside `scan`"),
    _lifted("add_metadata_axis", "missing", "NNX's transforms do it themselves"),
    _lifted("fold_rngs", "missing", "NNX has `split_rngs` and `fork_rngs`"),
    _lifted("named_call", "missing", "`jax.named_scope` does it"),
)

_Method: TypeAlias = tuple[str, str | None, Verdict, str]

# What has a plain counterpart.
_METHODS: tuple[_Method, ...] = (
    ("sow", "Module.sow", "differs", "takes the Variable type, and records inside `capture`"),
    ("perturb", "Module.perturb", "differs", "adds something inside `capture` only"),
    ("param", "Param", "differs", "a parameter is made in the constructor, as an attribute"),
    ("variable", "Variable", "differs", "a variable is made in the constructor, as an attribute"),
    ("make_rng", "Rngs", "differs", "call the stream: `rngs.dropout()`; other keys come out"),
    ("setup", None, "missing", "it becomes the constructor"),
    ("init", None, "missing", "the constructor makes the parameters"),
    ("init_with_output", None, "missing", "the constructor makes the parameters"),
    ("lazy_init", "eval_shape", "differs", "`eval_shape` of the constructor"),
    ("apply", "merge", "differs", "the module holds its variables: call it, or `merge` and call"),
    ("variables", "state", "differs", "`state` of the module, by Variable type"),
    ("get_variable", "state", "differs", "the attribute itself"),
    ("put_variable", "update", "differs", "write the attribute"),
    ("clone", "clone", "differs", "copies the variables too"),
    ("copy", "clone", "differs", "copies the variables too"),
    ("module_paths", "iter_modules", "differs", "gives the paths with the modules"),
    ("tabulate", "tabulate", "differs", "a function, which takes the module"),
)

# What a model does with its variables while it runs, which is another program in NNX.
_METHODS_BY_HAND: tuple[_Method, ...] = (
    ("bind", "merge", "differs", "the module holds its variables"),
    ("unbind", "split", "differs", "`split` takes the module and its variables apart"),
    ("has_variable", None, "missing", "ask for the attribute with `hasattr`"),
    ("has_rng", None, "missing", "ask `rngs` for the stream"),
    ("is_initializing", None, "missing", "initialisation is the constructor's"),
    ("is_mutable_collection", None, "missing", "every Variable can be written"),
    ("path", None, "missing", "an NNX module does not know where it is"),
)

_FUNCTIONS = (
    _row("api", "compact", None, "missing", "submodules are made in the constructor", "native"),
    _row("api", "compact_name_scope", None, "missing", "names are attributes", "by hand"),
    _row("api", "nowrap", None, "missing", "no method is wrapped, so none is excluded", "native"),
    _row(
        "api",
        "intercept_methods",
        None,
        "missing",
        "NNX calls methods without a hook",
        "host only",
        source="google/flax#4666",
    ),
    _row("api", "share_scope", None, "missing", "assign the same module or Variable", "by hand"),
    _row("api", "merge_param", None, "missing", "`nnx.module.first_from` is near", "by hand"),
    _row("api", "apply", None, "missing", "call a function of the module", "by hand"),
    _row("api", "init", None, "missing", "the constructor makes the parameters", "by hand"),
    _row("api", "init_with_output", None, "missing", "construct, then call", "by hand"),
    _row("api", "with_logical_partitioning", None, "missing", "metadata of the Param", "by hand"),
    _row(
        "api",
        "with_partitioning",
        "with_partitioning",
        "differs",
        "makes a Variable with `out_sharding`, where Linen makes a box",
        "native",
    ),
    _row("api", "with_logical_constraint", None, "missing", "a sharding constraint", "by hand"),
    _row(
        "api",
        "dot_product_attention",
        "dot_product_attention",
        "differs",
        "without dropout NNX calls `jax.nn.dot_product_attention`, which rounds in other places",
        "native",
    ),
    _row(
        "api",
        "dot_product_attention_weights",
        None,
        "missing",
        "NNX has it under `nnx.nn.attention` only",
        "by hand",
    ),
)

_LOGICAL = "logical names of axes are rules of `nnx.logical_axis_rules` or of the Param's metadata"
_PLUMBING = (
    ("broadcast", "an axis is None where nothing is mapped"),
    ("disable_named_call", "NNX names no calls"),
    ("enable_named_call", "NNX names no calls"),
    ("override_named_call", "NNX names no calls"),
    ("normalize", "`jax.nn.standardize` is its name"),
    ("unbox", "NNX has no boxes: metadata is in the Variable"),
    ("get_sharding", "`nnx.get_named_sharding` is near"),
    ("ones", "`nnx.initializers.ones` is its name"),
    ("ones_init", "`nnx.initializers.ones_init` is its name"),
    ("zeros", "`nnx.initializers.zeros` is its name"),
    ("zeros_init", "`nnx.initializers.zeros_init` is its name"),
    ("get_logical_axis_rules", _LOGICAL),
    ("set_logical_axis_rules", _LOGICAL),
    ("logical_to_mesh", _LOGICAL),
    ("logical_to_mesh_axes", _LOGICAL),
    ("logical_to_mesh_sharding", _LOGICAL),
)

API: tuple[Difference, ...] = (
    *_DERIVATIVES,
    *_LIFTED,
    *_FUNCTIONS,
    *(_row("api", name, None, "missing", what, "by hand") for name, what in _PLUMBING),
    *(_row("api", f"Module.{name}", nnx, v, what, "native") for name, nnx, v, what in _METHODS),
    *(
        _row("api", f"Module.{name}", nnx, v, what, "by hand")
        for name, nnx, v, what in _METHODS_BY_HAND
    ),
)
