"""The rows of the table of differences for lifted transforms and the rest of Linen's API."""

from __future__ import annotations

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

_WHAT_THEY_SHARE = (
    "takes Variables by type through `StateAxes`, where Linen names collections and streams"
)
_LIFTED = (
    _transform("vmap", "differs", _WHAT_THEY_SHARE, "by hand"),
    _transform("scan", "differs", _WHAT_THEY_SHARE, "by hand"),
    _transform("jit", "differs", "takes the module as an argument of the function", "by hand"),
    _transform("remat", "differs", "takes a function of the module, never a class", "by hand"),
    _row(
        "transform", "checkpoint", "remat", "differs", "Linen's other name for `remat`", "by hand"
    ),
    _transform("while_loop", "differs", "the module is part of the carry", "by hand"),
    _transform("cond", "differs", "the module is an argument of the branches", "by hand"),
    _transform("switch", "differs", "the module is an argument of the branches", "by hand"),
    _transform(
        "custom_vjp", "differs", "the backward pass takes gradients of module states", "by hand"
    ),
    _transform("map_variables", "missing", "NNX sees no variables through a function", "host only"),
    _transform("remat_scan", "missing", "write `remat` inside `scan`", "by hand"),
    _transform("add_metadata_axis", "missing", "NNX's transforms do it themselves", "by hand"),
    _transform("fold_rngs", "missing", "NNX has `split_rngs` and `fork_rngs`", "by hand"),
)

_METHODS = (
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
    ("bind", "merge", "differs", "the module holds its variables"),
    ("unbind", "split", "differs", "`split` takes the module and its variables apart"),
    ("variables", "state", "differs", "`state` of the module, by Variable type"),
    ("get_variable", "state", "differs", "the attribute itself"),
    ("put_variable", "update", "differs", "write the attribute"),
    ("has_variable", None, "missing", "ask for the attribute with `hasattr`"),
    ("has_rng", None, "missing", "ask `rngs` for the stream"),
    ("is_initializing", None, "missing", "initialisation is the constructor's"),
    ("is_mutable_collection", None, "missing", "every Variable can be written"),
    ("clone", "clone", "differs", "copies the variables too"),
    ("copy", "clone", "differs", "copies the variables too"),
    ("module_paths", "iter_modules", "differs", "gives the paths with the modules"),
    ("path", None, "missing", "an NNX module does not know where it is"),
    ("tabulate", "tabulate", "differs", "a function, which takes the module"),
)

_FUNCTIONS = (
    _row("api", "compact", None, "missing", "submodules are made in the constructor", "by hand"),
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
    _row("api", "share_scope", None, "missing", "assign the same module or Variable", "host only"),
    _row("api", "merge_param", None, "missing", "`nnx.module.first_from` is near", "by hand"),
    _row("api", "apply", None, "missing", "call a function of the module", "by hand"),
    _row("api", "init", None, "missing", "the constructor makes the parameters", "by hand"),
    _row("api", "init_with_output", None, "missing", "construct, then call", "by hand"),
    _row("api", "named_call", None, "missing", "`jax.named_scope` does it", "by hand"),
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

API: tuple[Difference, ...] = (
    *_DERIVATIVES,
    *_LIFTED,
    *_FUNCTIONS,
    *(
        _row("api", f"Module.{name}", nnx, verdict, what, "by hand")  # type: ignore[arg-type]
        for name, nnx, verdict, what in _METHODS
    ),
)
