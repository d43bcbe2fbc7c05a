"""Collectives read from texts: small ones written here, and what XLA makes of programs whose traffic is known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from stepjax.sharding.compiled.device_groups import MeshAxes
from stepjax.sharding.compiled.hlo import Collective, collectives, totals
from stepjax.sharding.devices import Target, devices

SHAPE = {"data": 2, "expert": 2, "tensor": 2}
PAIRS = "{{0,1},{2,3},{4,5},{6,7}}"  # along tensor


def module(entry: str, *computations: str) -> str:
    """An HLO module with these instructions in its entry; a computation is given as "name: instructions"."""
    parts = ["HloModule m, is_scheduled=true"]
    for computation in computations:
        name, _, body = computation.partition(":")
        parts.append(f"%{name} (p: f32[]) -> f32[] {{\n{body}\n}}")
    return "\n\n".join([*parts, f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}"])


def read(entry: str, *computations: str) -> list[Collective]:
    return collectives(module(entry, *computations), SHAPE)


def reduce_over(groups: str, *, shape: str = "f32[8,16]{1,0}", name: str = "r") -> str:
    return f"  %{name} = {shape} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"


NOTATIONS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
    "{{0,2},{1,3},{4,6},{5,7}}": ("expert",),
    "{{3,1},{2,0},{4,6},{5,7}}": ("expert",),  # no order is meant
    "{{0,1,2,3,4,5,6,7}}": ("data", "expert", "tensor"),
    "{}": ("data", "expert", "tensor"),
    "{{0},{1},{2},{3},{4},{5},{6},{7}}": (),
    "[4,2]<=[8]": ("tensor",),
    "[2,4]<=[8]": ("expert", "tensor"),
    "[4,2]<=[2,4]T(1,0)": ("data",),
    "[4,2]<=[2,2,2]T(0,2,1)": ("expert",),
    "[2,4]<=[2,2,2]T(1,0,2)": ("data", "tensor"),
    "mesh['data'=2,'expert'=2,'tensor'=2] {'expert'}": ("expert",),
    "mesh['data'=2,'expert'=2,'tensor'=2] {'data','tensor'}": ("data", "tensor"),
    "mesh[a=1,b=8] {a}": (),
    "mesh['a'=2,'b'=4] {'b':(1)2}": ("expert",),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": ("data", "expert"),
    "mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}": ("expert", "tensor"),
    "mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'b'}": ("data", "tensor"),
    "mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}": ("data",),
    "mesh['a'=8] {'a':(1)2}": ("data",),
    "mesh['a'=8] {'a':(2)2}": ("expert",),
    "mesh['a'=8] {'a':(4)2}": ("tensor",),
    "mesh['a'=8] {'a':(2)4}": ("expert", "tensor"),
    "mesh['a'=8] {'a':(1)2,'a':(4)2}": ("data", "tensor"),
}


@pytest.mark.parametrize("groups", NOTATIONS)
def test_groups_name_the_axes_they_run_along(groups):
    (one,) = read(reduce_over(groups))
    assert one.axes == NOTATIONS[groups]
    assert one.group_size == math.prod(SHAPE[axis] for axis in one.axes)


def test_parts_of_axes_are_smaller_than_they_are():
    """As where two KV heads lie on a tensor axis of four."""
    text = module(reduce_over("mesh['a'=2,'b'=4] {'b':(2)2}"))
    (one,) = collectives(text, {"data": 2, "tensor": 4})
    assert (one.axes, one.group_size) == (("tensor",), 2)
    (one,) = read(reduce_over("{{0,3},{1,2},{4,7},{5,6}}"))
    assert (one.axes, one.group_size) == (("expert", "tensor"), 2)


@pytest.mark.parametrize("axes", [[], [0], [2], [3], [0, 2], [0, 3], [2, 3], [0, 2, 3]])
def test_axes_of_groups_made_by_numpy(axes):
    """Axes moved last and flattened are groups along them. An axis of size 1 is never named."""
    shape = {"data": 2, "context": 1, "expert": 3, "tensor": 4}
    ids = np.arange(24).reshape(tuple(shape.values()))
    rest = [i for i in range(4) if i not in axes]
    groups = ids.transpose(*rest, *axes).reshape(-1, math.prod(ids.shape[i] for i in axes))
    assert MeshAxes(shape).along(groups.tolist()) == tuple(list(shape)[i] for i in axes)


def test_unknown_notation_is_an_error():
    with pytest.raises(ValueError, match="notation"):
        read(reduce_over("@mesh<tensor>"))


@pytest.mark.parametrize(
    ("instruction", "kind", "payload", "wire"),
    [
        ("f32[8,16] all-reduce(%p), {g}", "all-reduce", 512, 512),
        ("f32[8,16] all-reduce-start(%p), {g}", "all-reduce", 512, 512),
        ("(f32[8,16], bf16[4]) all-reduce-start(%p, %q), {g}", "all-reduce", 520, 520),
        ("f32[8,16] all-gather(%p), {g}, dimensions={{0}}", "all-gather", 512, 256),
        ("(f32[4,16], f32[8,16]) all-gather-start(%p), {g}", "all-gather", 512, 256),
        ("((f32[4], s32[4]), (f32[8], s32[8])) all-gather-start(%p, %q), {g}", "all-gather", 64, 32),
        ("f32[4,16] reduce-scatter(%p), {g}", "reduce-scatter", 512, 256),
        ("((f32[8,16]), f32[4,16]) reduce-scatter-start(%p), {g}", "reduce-scatter", 512, 256),
        ("(f32[4,16], f32[4,16]) all-to-all(%p, %q), {g}", "all-to-all", 512, 256),
        ("((f32[8,16]), f32[8,16]) all-to-all-start(%p), {g}", "all-to-all", 512, 256),
        ("((f32[8,16], f32[9,16], s64[2]), f32[9,16]) ragged-all-to-all-start(%p), {g}", "ragged-all-to-all", 576, 288),
        ("f32[8,16] collective-broadcast(%p), {g}", "collective-broadcast", 512, 512),
        ("f32[8,16] collective-permute(%p), {p}", "collective-permute", 512, 512),
        ("(f32[8,16], f32[8,16], u32[], u32[]) collective-permute-start(%p), {p}", "collective-permute", 512, 512),
        ("pred[3,5] all-gather(%p), {g}", "all-gather", 15, 7.5),
        ("s4[3,5]{{1,0:E(4)}} all-gather(%p), {g}", "all-gather", 8, 4),
        ("f8e4m3fn[3,5] all-gather(%p), {g}", "all-gather", 15, 7.5),
        ("bf16[2,3]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%p), {g}", "all-gather", 12, 6),
        ("f32[] all-reduce(%p), {g}", "all-reduce", 4, 4),
    ],
)
def test_bytes_of_each_kind(instruction, kind, payload, wire):
    text = instruction.format(g=f"channel_id=1, replica_groups={PAIRS}", p="source_target_pairs={{0,1},{1,0}}")
    (one,) = read(f'  ROOT %x.1 = {text}, metadata={{op_name="jit(f)/layer_3/psum" stack_frame_id=5}}')
    assert (one.kind, one.axes, one.group_size) == (kind, ("tensor",), 2)
    assert (one.payload_bytes, one.wire_bytes) == (payload, wire)
    assert one.scope == "jit(f)/layer_3/psum"


def test_done_is_not_a_second_launch_and_counters_are_not_types():
    start = f"((f32[8]), /*index=5*/f32[8]) all-to-all-start(%p), replica_groups={PAIRS}"
    (one,) = read(f"  %s = {start}\n  %d = f32[8] all-to-all-done(%s)\n  %u = f32[8] add(%d, %d)")
    assert (one.num_launches, one.payload_bytes) == (1, 32)


def test_async_wrapper_counts_once():
    wrapped = f"wrapped: {reduce_over(PAIRS)}"
    lines = [f"  %{op} = ((f32[8]), f32[8]) async-{op}(%p), calls=%wrapped" for op in ("start", "update", "done")]
    (one,) = read("\n".join(lines), wrapped)
    assert one.num_launches == 1


def test_what_only_looks_like_a_call_is_none():
    lines = [
        '  %a = f32[8] add(%p, %p), metadata={op_name="calls=%nothing"}, control-predecessors={%p, %q}',
        "  %c = s32[4] constant({1, 2, 3, 4})",
        reduce_over(PAIRS) + ", control-predecessors={%a}",
    ]
    assert len(read("\n".join(lines))) == 1


def loop(body: str, count: int | None, name: str = "w") -> str:
    known = f', backend_config={{"known_trip_count":{{"n":"{count}"}}}}' if count is not None else ""
    return f"  %{name} = (s32[]) while(%p), condition=%condition, body=%{body}{known}"


CONDITION = "condition:  ROOT %c = pred[] compare(%p, %p), direction=LT"


def test_loops_multiply():
    inner, outer = f"inner:{reduce_over(PAIRS)}", f"outer:{loop('inner', 3)}\n{reduce_over('[2,4]<=[8]')}"
    found = read(loop("outer", 5), CONDITION, inner, outer)
    assert [(one.axes, one.num_launches, one.certainty) for one in found] == [
        (("tensor",), 15, "exact"),
        (("expert", "tensor"), 5, "exact"),
    ]
    assert read(loop("inner", 0), CONDITION, inner) == []


def test_condition_runs_once_more_than_the_body():
    (one,) = read(loop("body", 4), f"condition:{reduce_over(PAIRS)}", "body:  ROOT %b = s32[] add(%p, %p)")
    assert one.num_launches == 5


def test_unknown_length_is_said():
    inner = f"inner:{reduce_over(PAIRS)}"
    (one,) = read(loop("outer", None), CONDITION, inner, f"outer:{loop('inner', 3)}")
    assert (one.num_launches, one.certainty) == (3, "per_iteration")


@pytest.mark.parametrize(
    "attributes", ["branch_computations={%little, %much, %none}", "true_computation=%little, false_computation=%much"]
)
def test_of_branches_the_one_that_sends_most_is_counted(attributes):
    branches = (
        f"little:{reduce_over(PAIRS)}",
        f"much:{reduce_over(PAIRS, name='r1')}\n{reduce_over('[2,4]<=[8]', name='r2')}",
        "none:  ROOT %n = f32[] add(%p, %p)",
    )
    found = read(f"  %c = (f32[8]) conditional(%p, %p, %p), {attributes}", *branches)
    assert [(one.axes, one.certainty) for one in found] == [
        (("tensor",), "at_most"),
        (("expert", "tensor"), "at_most"),
    ]


def test_a_computation_counts_as_often_as_it_is_called():
    calls = "  %a = f32[8] call(%p), to_apply=%work\n  %b = f32[8] fusion(%a), kind=kLoop, calls=%work"
    (one,) = read(calls, f"work:{reduce_over(PAIRS)}")
    assert one.num_launches == 2


def test_totals_sum_launches_by_kind_and_axes():
    small, large = reduce_over(PAIRS, shape="f32[2]"), reduce_over(PAIRS, shape="f32[8]")
    found = read(f"{small}\n{loop('body', 3)}\n{reduce_over('[2,4]<=[8]')}", CONDITION, f"body:{large}")
    wide, narrow = totals(found)
    assert (wide.axes, wide.num_launches, wide.payload_bytes, wide.wire_bytes) == (("expert", "tensor"), 1, 512, 768)
    assert (narrow.axes, narrow.num_launches, narrow.payload_bytes) == (("tensor",), 4, 8 + 3 * 32)
    assert totals(dataclasses.replace(one, certainty="at_most") for one in found)[0].certainty == "at_most"


# The rest is compiled: for 8 virtual CPU devices, and for 8 GPUs that are not there.

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)  # 512 bytes
BOTH = [(0, 1), (1, 0)]

PROGRAMS = {
    "all-reduce": (lambda x: lax.psum(x, "expert"), ["all-reduce expert 512 x1"]),
    "over two axes": (lambda x: lax.psum(x, ("data", "tensor")), ["all-reduce data,tensor 512 x1"]),
    "over all axes": (lambda x: lax.psum(x, ("data", "expert", "tensor")), ["all-reduce data,expert,tensor 512 x1"]),
    "all-gather": (lambda x: lax.all_gather(x, "data"), ["all-gather data 1024 x1"]),
    "reduce-scatter": (lambda x: lax.psum_scatter(x, "tensor", tiled=True), ["reduce-scatter tensor 512 x1"]),
    "all-to-all": (
        lambda x: lax.all_to_all(x, ("expert", "tensor"), 0, 1, tiled=True),
        ["all-to-all expert,tensor 512 x1"],
    ),
    "permute": (lambda x: lax.ppermute(x, "expert", BOTH), ["collective-permute expert 512 x1"]),
    "fori_loop": (
        lambda x: lax.fori_loop(0, 5, lambda _, x: lax.psum(jnp.sin(x), "expert"), x),
        ["all-reduce expert 512 x5"],
    ),
    "scan in a loop": (
        lambda x: lax.fori_loop(
            0, 5, lambda _, x: lax.scan(lambda x, _: (lax.psum(jnp.sin(x), "data"), None), x, length=3)[0], x
        ),
        ["all-reduce data 512 x15"],
    ),
    "while_loop": (
        lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: lax.psum(x, "expert"), x),
        ["all-reduce expert 512 x1 per_iteration"],
    ),
    "cond": (
        lambda x: lax.cond(
            x[0, 0] > 0,
            lambda x: lax.psum(lax.psum(jnp.sin(x), "expert") * 2, "tensor"),
            lambda x: lax.psum(x, "expert"),
            x,
        ),
        ["all-reduce expert 512 x1 at_most", "all-reduce tensor 512 x1 at_most"],
    ),
    "nothing": (lambda x: x + 1, []),
}


def mesh_of(target: Target) -> Mesh:
    return Mesh(np.array(devices(target, 8)).reshape(2, 2, 2), tuple(SHAPE), axis_types=(AxisType.Auto,) * 3)


def described(one: Collective) -> str:
    text = f"{one.kind} {','.join(one.axes)} {one.payload_bytes} x{one.num_launches}"
    return text if one.certainty == "exact" else f"{text} {one.certainty}"


def text_of(function, *arguments, **options) -> str:
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    assert text
    return text


TARGETS = ["cpu", pytest.param("h100", marks=pytest.mark.aot)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_written_collectives_are_counted(name, target):
    function, expected = PROGRAMS[name]
    body = jax.shard_map(function, mesh=mesh_of(target), in_specs=P(), out_specs=P(), check_vma=False)
    found = collectives(text_of(body, X), SHAPE)
    assert [described(one) for one in found] == expected


@pytest.mark.parametrize("target", TARGETS)
def test_inserted_collectives_are_counted_and_named_after_their_layer(target):
    """Two layers split as Megatron does it, scanned and unrolled; each contracts over tensor twice."""
    mesh = mesh_of(target)

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def block(x_BD, weights):
        up_DF, down_FD = weights
        return x_BD + jnp.tanh(x_BD @ up_DF) @ down_FD

    def unrolled(x_BD, up_LDF, down_LFD):
        for i in range(2):
            with jax.named_scope(f"layer_{i}"):
                x_BD = block(x_BD, (up_LDF[i], down_LFD[i]))
        return x_BD

    def scanned(x_BD, up_LDF, down_LFD):
        return lax.scan(lambda x, w: (block(x, w), None), x_BD, (up_LDF, down_LFD))[0]

    arguments = (
        abstract((8, 16), "data"),
        abstract((2, 16, 32), None, None, "tensor"),
        abstract((2, 32, 16), None, "tensor"),
    )
    output = NamedSharding(mesh, P("data"))
    for function in (scanned, unrolled):
        found = collectives(text_of(function, *arguments, out_shardings=output), mesh.shape)
        assert [(total.kind, total.axes, total.num_launches, total.payload_bytes) for total in totals(found)] == [
            ("all-reduce", ("tensor",), 2, 2 * (8 // 2) * 16 * 4)
        ]
    assert [[f"layer_{i}" in one.scope for one in found] for i in range(2)] == [[True, False], [False, True]]


def test_several_arrays_in_one_launch():
    """XLA's CPU backend combines them."""

    def both(x, y):
        return lax.psum(x, "expert"), lax.psum(y, "expert")

    body = jax.shard_map(both, mesh=mesh_of("cpu"), in_specs=(P(), P()), out_specs=(P(), P()))
    y = jax.ShapeDtypeStruct((4,), jnp.float32)
    (one,) = collectives(text_of(body, X, y), SHAPE)
    assert described(one) == "all-reduce expert 528 x1"
