"""The faults."""

from __future__ import annotations

from tests.mutation._fault import Fault

_GROUP = "nnx_bridge/functional/_group.py"
_STORAGE = "nnx_bridge/functional/_storage.py"
_HIDDEN = "nnx_bridge/functional/_hidden.py"
_SNAPSHOT = "nnx_bridge/functional/_snapshot.py"
_TANGENTS = "nnx_bridge/functional/_tangents.py"
_FILTERS = "nnx_bridge/functional/_filters.py"
_RECORDING = "nnx_bridge/captures/_recording.py"
_RECORDS = "nnx_bridge/captures/_records.py"
_OUTPUTS = "nnx_bridge/captures/_method_outputs.py"
_DERIVATIVES = "nnx_bridge/captures/_derivatives.py"
_CONTEXT = "nnx_bridge/captures/_context.py"

_COLLECTIONS = "nnx_bridge/_collections.py"
_FRAME = "nnx_bridge/host/_frame.py"
_PROGRAM = "nnx_bridge/host/_program.py"
_CHECK = "nnx_bridge/equivalence/_check.py"

_LIFTED = "nnx_bridge/transforms/"
_LIFTED_TESTS = "tests/nnx_bridge/transforms"
_BOXES = "tests/nnx_bridge/test_collections.py"
_HOST = "tests/nnx_bridge/host/test_host.py"
_WRITES = "tests/nnx_bridge/functional/test_writes.py"
_FAILURES = "tests/nnx_bridge/functional/test_failures.py"
_FILTERED = "tests/nnx_bridge/functional/test_filters.py"
_REFERENCES = "tests/nnx_bridge/functional/test_references.py"
_CAPTURE = "tests/nnx_bridge/captures/test_context.py"
_GRADS = "tests/nnx_bridge/captures/test_derivatives.py"

FAULTS = [
    # The functionaliser of NNX.
    Fault(
        "a hidden Variable is visible",
        _GROUP,
        "            if not visible(path[1:], leaf)\n",
        "            if False\n",
        f"{_FILTERED}",
    ),
    Fault(
        "what is written in place is the caller's",
        _GROUP,
        "fresh = treedef.unflatten(parts)  # type: ignore[attr-defined]",
        "fresh = leaves",
        f"{_WRITES} {_FAILURES}",
    ),
    Fault(
        "given variables are not put into the copies",
        _GROUP,
        "given.get(path, leaf) for path",
        "leaf for path",
        f"{_FILTERED} -k tangents",
    ),
    Fault(
        "written Variables are not published",
        _GROUP,
        "            for _, original, variable in changed:\n                write(",
        "            for _, original, variable in changed[1:]:\n                write(",
        f"{_WRITES} -k plain_call",
    ),
    Fault(
        "Variables are written before all of them are checked",
        _GROUP,
        "            for path, original, _ in changed:\n                check_writable",
        "            for path, original, _ in changed[:0]:\n                check_writable",
        f"{_FAILURES}",
    ),
    Fault(
        "a change of the graph is not seen",
        _GROUP,
        "if snapshot.holds():",
        "if True:",
        f"{_WRITES} -k graph",
    ),
    Fault(
        "new values take the place of old ones",
        _GROUP,
        "next(new) if source is None else old[source.place]",
        "next(new) if source is None else old[source.place - 1]",
        f"{_WRITES} -k graph",
    ),
    Fault(
        "an unchanged Variable counts as written",
        _GROUP,
        "if path not in old or not _unchanged(old[path], leaf)",
        "if True",
        f"{_FILTERED} -k tangents_of",
    ),
    Fault(
        "a created Variable is forgotten",
        _GROUP,
        "if path not in old or not _unchanged(old[path], leaf)",
        "if path in old and not _unchanged(old[path], leaf)",
        f"{_FILTERED} -k created",
    ),
    Fault(
        "changed metadata is not written",
        _GROUP,
        "if same_value and _flax_private.same_metadata(before, after):",
        "if same_value:",
        f"{_WRITES} -k metadata",
    ),
    Fault(
        "the streams of RNG state are not filtered by name",
        "nnx_bridge/functional/_filters.py",
        "return in_filter(rngs, name) if stream is None else stream(path, leaf)",
        "return bool(rngs)",
        f"{_FILTERED}",
    ),
    Fault(
        "no note where fn writes to a module that it closes over",
        _GROUP,
        "error.add_note(note)",
        "pass",
        "tests/nnx_bridge/functional/test_errors.py -k closes_over",
    ),
    Fault(
        "hidden Variables are not put back",
        _HIDDEN,
        "for slots, key, before, after in reversed(taken):",
        "for slots, key, before, after in []:",
        f"{_WRITES} {_FILTERED}",
    ),
    Fault(
        "what the caller puts in a hidden place is lost",
        _HIDDEN,
        "if slots.get(key, _ABSENT) is after:",
        "if True:",
        f"{_WRITES} {_FILTERED}",
    ),
    Fault(
        "containers that change in place are not compared",
        _SNAPSHOT,
        "if type(value) in _CONTAINERS and _is_mutable(value)",
        "if False",
        f"{_WRITES} -k containers",
    ),
    Fault(
        "a predicate of DenyList is not negated",
        _FILTERS,
        "return lambda path, leaf: not denied(path, leaf)",
        "return lambda path, leaf: denied(path, leaf)",
        f"{_FILTERED}",
    ),
    Fault(
        "unknown tangents are dropped",
        _TANGENTS,
        "    if rest:\n",
        "    if False:\n",
        "tests/nnx_bridge/functional/test_errors.py -k bad_tangent",
    ),
    Fault(
        "tangents may not hold references",
        _TANGENTS,
        "tangents = jax.tree.map(plain, tangents, is_leaf=lambda x: isinstance(x, nnx.Variable))",
        "pass",
        f"{_REFERENCES} -k tangents",
    ),
    Fault(
        "a reference is replaced by an array",
        _STORAGE,
        "    if not holds_reference(original):\n",
        "    if True:\n",
        f"{_REFERENCES} -k plain_variables",
    ),
    Fault(
        "a reference gets a value that it cannot hold",
        _STORAGE,
        "if np.shape(new) != np.shape(held) or dtype_of(new) != dtype_of(held):",
        "if False:",
        f"{_REFERENCES} -k cannot_hold",
    ),
    Fault(
        "a reference that fn makes is an array afterwards",
        _GROUP,
        "leaves[place] = leaves[place].copy(ref=True)",
        "pass",
        f"{_REFERENCES} -k makes",
    ),
    Fault(
        "what is written to references is lost where the graph changes",
        _GROUP,
        "        for original, variable in contents:\n            write(original, variable)\n",
        "",
        f"{_REFERENCES} -k same_objects",
    ),
    # Captures.
    Fault(
        "recorded values may be written in another trace",
        _RECORDS,
        "if _flax_private.trace_state() != self._trace_state:",
        "if False:",
        f"{_CAPTURE} -k closes_over",
    ),
    Fault(
        "pytrees are perturbed as they are",
        _RECORDS,
        "return value if jax.tree_util.all_leaves([value]) else _Addend(value)",
        "return value",
        f"{_CAPTURE} -k pytrees",
    ),
    Fault(
        "the class of a module is not restored",
        _OUTPUTS,
        "        for module, cls in zip(modules, classes, strict=True):\n"
        '            object.__setattr__(module, "__class__", cls)\n',
        "        pass\n",
        f"{_CAPTURE} {_GRADS}",
    ),
    Fault(
        "inherited methods are not sown",
        _OUTPUTS,
        "for base in cls.__mro__ for name in vars(base)",
        "for base in cls.__mro__[:1] for name in vars(base)",
        f"{_CAPTURE} -k inherited",
    ),
    Fault(
        "methods of all names are sown",
        _OUTPUTS,
        'name == "__call__" or not name.startswith("_")',
        "True",
        f"{_CAPTURE} -k inherited",
    ),
    Fault(
        "seeds of unknown modules are dropped",
        _RECORDING,
        "            _check_seed(target, path)\n",
        "",
        "tests/nnx_bridge/captures tests/nnx_bridge/host",
    ),
    Fault(
        "no note where a recorded value has no axis",
        _RECORDING,
        "error.add_note(_BROADCAST)",
        "pass",
        f"{_CAPTURE} -k broadcast",
    ),
    Fault(
        "new nodes of a host keep the context",
        _RECORDING,
        "            stack.callback(_leave_new, targets, known, set(types))\n",
        "",
        "tests/nnx_bridge/host/test_captures.py",
    ),
    Fault(
        "what is recorded is of the default kind of Variable",
        _RECORDING,
        "return kind(value, ref=False, hijax=False)",
        "return kind(value)",
        f"{_REFERENCES} -k captures",
    ),
    Fault(
        "statistics of a capture are not published",
        _CONTEXT,
        "        functional.publish(updates)\n",
        "",
        f"{_CAPTURE} -k statistics",
    ),
    Fault(
        "states of a capture are in the order of recording",
        _CONTEXT,
        "states = [recorded[kinds.index(kind)] for kind in var_types]",
        "states = recorded[: len(var_types)][::-1]",
        f"{_CAPTURE} -k order",
    ),
    Fault(
        "argnums of capture_grad are off by one",
        _DERIVATIVES,
        "i % len(primals) + 1 for i in chosen",
        "i % len(primals) for i in chosen",
        f"{_GRADS}",
    ),
    Fault(
        "perturbations start at one",
        _DERIVATIVES,
        "seeds = [jnp.zeros_like(zero) for zero in zeros]",
        "seeds = [jnp.ones_like(zero) for zero in zeros]",
        f"{_GRADS}",
    ),
    Fault(
        "the shapes of perturbations are found without the filter of variables",
        _DERIVATIVES,
        "lifted.functionalize(self.mdl, variables=variables, frozen=frozen, rngs=rngs)",
        "lifted.functionalize(self.mdl)",
        f"{_GRADS}",
    ),
    # Collections and the host.
    Fault(
        "a box is forgotten",
        _COLLECTIONS,
        "    if BOX not in metadata:\n",
        "    if True:\n",
        _BOXES,
    ),
    Fault(
        "names of a changed axis are not put into the box",
        _COLLECTIONS,
        "return box.replace(names=tuple(names))",
        "return box",
        f"{_BOXES} {_HOST}",
    ),
    Fault(
        "a Variable forgets its Linen name",
        _COLLECTIONS,
        "    if linen_name(attribute) != name:\n",
        "    if False:\n",
        _BOXES,
    ),
    Fault(
        "the attribute of a clashing name is taken for the name",
        "nnx_bridge/_names.py",
        "return attribute[:-1]",
        "return attribute",
        "tests/nnx_bridge/host/test_names.py",
    ),
    Fault(
        "a new Variable type cannot be found by pickle",
        "nnx_bridge/_variable_types.py",
        'kind.__module__, kind.__qualname__ = __name__, f"TYPES.{_quoted(collection)}"',
        "pass",
        "tests/nnx_bridge/host/test_copies.py",
    ),
    Fault(
        "init makes what the setup of a replaced module makes",
        "nnx_bridge/host/_replacing.py",
        "scope.mutable = False",
        "pass",
        "tests/nnx_bridge/host/test_replacements.py",
    ),
    Fault(
        "two values of one path: the last one wins",
        _COLLECTIONS,
        "        if path[-1] in branch:\n",
        "        if False:\n",
        _BOXES,
    ),
    Fault(
        "a box for another type is taken",
        _COLLECTIONS,
        "if value.var_type is not kind:",
        "if False:",
        _BOXES,
    ),
    Fault(
        "values that did not change are written",
        _COLLECTIONS,
        "if not identical(value, held):",
        "if True:",
        "tests/nnx_bridge/host",
    ),
    Fault(
        "sown values are an input of the next call",
        _FRAME,
        '        variables.pop("intermediates", None)\n',
        "",
        _HOST,
    ),
    Fault(
        "the host does not keep what the call changed",
        _FRAME,
        "        write(self._node, self._contents, self.variables, updates)\n",
        "",
        _HOST,
    ),
    Fault(
        "the host does not record what a call sows",
        _FRAME,
        "            deposit(self._node, sown, below)\n",
        "            pass\n",
        "tests/nnx_bridge/host/test_captures.py",
    ),
    Fault(
        "a host is never equal to another",
        _PROGRAM,
        "same = self.module is other.module or self.module == other.module",
        "same = False",
        _HOST,
    ),
    # Equivalence.
    Fault(
        "the gradient with respect to inputs is that of parameters",
        "nnx_bridge/equivalence/_measures.py",
        "(parameters, inputs), (outputs, after) = grad(data.parameters, data.primals)",
        "(inputs, parameters), (outputs, after) = grad(data.parameters, data.primals)",
        "tests/nnx_bridge/equivalence/test_check.py",
    ),
    Fault(
        "an error of a route is no row",
        _CHECK,
        "yield from (raised(what, route, error) for what, arrays in reported.items() if arrays)",
        "yield from ()",
        "tests/nnx_bridge/equivalence/test_check.py",
    ),
    Fault(
        "the model takes values that it does not hold",
        "nnx_bridge/equivalence/_routes.py",
        "data = data._replace(variables={})",
        "pass",
        "tests/nnx_bridge/equivalence/test_check.py",
    ),
    # Linen's lifted transforms.
    Fault(
        "what JAX keeps of a custom_vjp holds the arrays of the module",
        _LIFTED + "_custom_vjp.py",
        "pure = bare(functional)",
        "pure = functional",
        f"{_LIFTED_TESTS}/test_variables.py -k of_the_users",  # From JAX 0.12 on.
    ),
    Fault(
        "the condition of a loop draws what the step draws",
        _LIFTED + "_while_loop.py",
        "step(state, -1)",
        "step(state, 1)",
        f"{_LIFTED_TESTS}/test_control_flow.py -k condition",
    ),
    Fault(
        "streams stay where they are in a loop that ends by itself",
        _LIFTED + "_while_loop.py",
        "counts = [kept.pop(key, lifting.parts[key]) for key in inputs.counts]",
        "counts = [(kept.pop(key, 0), lifting.parts[key])[1] for key in inputs.counts]",
        f"{_LIFTED_TESTS}/test_control_flow.py -k streams",
    ),
    Fault(
        "streams stay where they are in a loop",
        _LIFTED + "_loop.py",
        "kept.pop(key, self._lifting.parts[key] if isinstance(key, int) else was)",
        "(kept.pop(key, None), was)[1]",
        f"{_LIFTED_TESTS}/test_targets.py -k loop_of_one_step",
    ),
    Fault(
        "spmd_axis_name is ignored",
        _LIFTED + "_vmap.py",
        '"axis_name": axis_name, "spmd_axis_name": spmd_axis_name}\n        call',
        '"axis_name": axis_name}\n        call',
        f"{_LIFTED_TESTS}/test_programs.py -k axis_of_a_mesh",
    ),
    Fault(
        "methods may disagree on how Variables are made",
        _LIFTED + "_targets.py",
        "if value != expected:",
        "if False:",
        f"{_LIFTED_TESTS}/test_errors.py -k disagree",
    ),
    # The transforms.
    Fault(
        "integers are differentiated",
        "lifted/_inputs.py",
        "            if w and is_differentiable(x)\n",
        "            if w\n",
        "tests/lifted/test_tangents.py",
    ),
    Fault(
        "leaves get the values of others",
        "lifted/_inputs.py",
        "for i, value in zip(self.active, values, strict=True):",
        "for i, value in zip(self.active, values[::-1], strict=True):",
        "tests/lifted/test_programs.py",
    ),
    Fault(
        "negative argnums are out of range",
        "lifted/_inputs.py",
        "if not -len(primals) <= i < len(primals):",
        "if not 0 <= i < len(primals):",
        "tests/lifted/test_outputs.py tests/lifted/test_plain_calls.py",
    ),
    Fault(
        "updates are not published",
        "lifted/_engine.py",
        "        functional.publish(updates)\n",
        "",
        "tests/lifted/test_writes.py",
    ),
    Fault(
        "inside init the gradient of created variables is left out",
        "lifted/_engine.py",
        "            if extended is not None:\n",
        "            if False:\n",
        "tests/lifted/test_init.py",
    ),
    Fault(
        "a vector passes for a scalar",
        "lifted/_engine.py",
        "        if np.shape(y) != ():\n",
        "        if False:\n",
        "tests/lifted/test_errors.py",
    ),
    Fault(
        "an unknown variable has a tangent",
        "lifted/_tangents.py",
        "if key not in values and jax.tree.leaves(tangent) and not partial:",
        "if False:",
        "tests/lifted/test_errors_of_tangents.py",
    ),
    Fault(
        "a tangent may have another shape",
        "lifted/_tangents.py",
        "    if np.shape(tangent) != np.shape(value):\n",
        "    if False:\n",
        "tests/lifted/test_errors_of_tangents.py",
    ),
    Fault(
        "gradients of what is mapped are summed, too",
        "lifted/_reduce.py",
        "if marker_mapped and not value_mapped:",
        "if marker_mapped:",
        "tests/lifted/test_reduce_axes.py",
    ),
    Fault(
        "gradients are not summed",
        "lifted/_reduce.py",
        "if marker_mapped and not value_mapped:",
        "if False:",
        "tests/lifted/test_reduce_axes.py",
    ),
    Fault(
        "writes to a closed-over module are not seen",
        "lifted/_closures.py",
        "if path in old and old[path] is value or not traces(value) & ours:",
        "if True:",
        "tests/lifted/test_closures.py",
    ),
    Fault(
        "writes to a closed-over module are not undone",
        "lifted/_closures.py",
        "            f.restore(state)\n",
        "            pass\n",
        "tests/lifted/test_closures.py",
    ),
    Fault(
        "tangents of integers that fn wrote are missing",
        "lifted/_forward.py",
        "next(dots) if is_differentiable(x) else zeros_float0(np.shape(x))",
        "next(dots)",
        "tests/lifted/test_tangents.py tests/nnx_bridge/functional/test_filters.py -k tangents",
    ),
    # The layers.
    Fault(
        "kept weights are scaled by the rate that was asked for",
        "layers/_drop.py",
        "scale = 1.0 / bits.probability(rate)",
        "scale = 1.0",
        "tests/layers/test_drop.py tests/layers/test_linear.py",
    ),
    Fault(
        "out_sharding is ignored",
        "layers/_linear.py",
        '("out_sharding", out_sharding),',
        '("out_sharding", None),',
        "tests/layers/test_sharding.py -k out_sharding",
    ),
    Fault(
        "the argument does not override the attribute deterministic",
        "layers/_base.py",
        "        if deterministic is None:\n            deterministic = self.deterministic\n",
        "        deterministic = self.deterministic\n",
        "tests/layers/test_linear.py",
    ),
    Fault(
        "the two words of a block are one",
        "layers/_generators.py",
        "pair = pair | ((odd < threshold)",
        "pair = pair | ((even < threshold)",
        "tests/layers/test_generators.py",
    ),
    Fault(
        "bernoulli keeps by 24 bits",
        "layers/_generators.py",
        "((high ^ low) >> jnp.uint32(9))",
        "((high ^ low) >> jnp.uint32(8))",
        "tests/layers/test_generators.py -k bernoulli",
    ),
    Fault(
        "blocks of rows begin at the first row",
        "layers/_per_example.py",
        "first_rows = (jnp.arange(together) * count + index) * size",
        "first_rows = (jnp.arange(together) * count) * size",
        "tests/layers/test_per_example.py -k mask_of_its_index",
    ),
    Fault(
        "examples that are taken together share a mask",
        "layers/_per_example.py",
        "indices = jnp.arange(count)\n",
        "indices = jnp.arange(count) // together\n",
        "tests/layers/test_per_example.py -k mask_of_its_index",
    ),
    Fault(
        "a sharded batch is taken example by example",
        "layers/_per_example.py",
        "together = math.gcd(count, devices) or 1",
        "together = 1",
        "tests/layers/test_sharding.py -k plain_layer_moves",
    ),
    Fault(
        "a sharded kernel is taken block by block",
        "layers/_per_example.py",
        "together = math.gcd(rows // ROWS, devices)",
        "together = 1",
        "tests/layers/test_sharding.py -k plain_layer_moves",
    ),
    Fault(
        "half precision is summed in half precision",
        "layers/_per_example.py",
        "total = jnp.zeros_like(like, dtype=wide_dtype(like.dtype))",
        "total = jnp.zeros_like(like, dtype=like.dtype)",
        "tests/layers/test_per_example.py -k half",
    ),
    # Where arrays are.
    Fault(
        "the gradients at perturbed values are gathered, or summed over devices",
        _DERIVATIVES,
        "jnp.zeros_like(zero) for zero in zeros",
        "jnp.zeros(zero.shape, zero.dtype) for zero in zeros",
        "tests/sharding/test_migration.py -k test_captures",
    ),
    Fault(
        "a tangent that is left out is on no mesh",
        "lifted/_inputs.py",
        "jnp.zeros_like(jax.eval_shape(lambda x: x, x), x.dtype)",
        "jnp.zeros(x.shape, x.dtype)",
        "tests/sharding/test_derivatives.py -k linearize",
    ),
    Fault(
        "what a loop writes alike is on no mesh",
        _LIFTED + "_loop.py",
        "jnp.zeros_like(shape)",
        "jnp.zeros(shape.shape, shape.dtype)",
        "tests/sharding/test_transforms.py -k writes",
    ),
    Fault(
        "the reference in float64 leaves jax.shard_map",
        "nnx_bridge/equivalence/_exact.py",
        'if primitive.name == "shard_map":',
        'if primitive.name == "shard map":',
        "tests/sharding/test_weights.py -k comparison_runs",
    ),
    Fault(
        "loops of the reference in float64 lose shardings",
        "nnx_bridge/equivalence/_exact.py",
        "lambda *arguments: tuple(map(promote, arguments)), *(v.aval for v in value.jaxpr.invars)",
        "lambda *xs: tuple(map(promote, xs)),\n"
        "            *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)"
        " for v in value.jaxpr.invars),",
        "tests/sharding/test_weights.py -k comparison_runs",
    ),
]
