"""Launches read from XLA's lists of thunks, and bytes read from a module's text: both small enough to count by hand."""

import pytest

from stepjax.sharding.compiled.launches import LaunchCounts, all_layers, count_launches, read_dump, read_thunks
from stepjax.sharding.compiled.module import HloModule
from stepjax.sharding.compiled.traffic import ExpertArrays, traffic

THUNKS = """\
001: kCustomKernel  [source       | next=000 (1)] fusion grid: [1, 1, 1] threads: [32, 1, 1]
000: kCommandBuffer [prev=001 (1) | next=006 (1)]
    002: kCustomKernel [source       | next=003 (1)] dot grid: [1, 1, 1] threads: [32, 1, 1]
    003: kConditional  [prev=002 (1) | sink        ]
      false_branch:
        004: kCopy [source | sink] kCopy
      true_branch:
        005: kKernel [source | next=015 (1)] a
        015: kKernel [prev=005 (1) | sink] b
007: kAsyncStart    [prev=000 (1) | next=009 (1)] stream=communication_stream[0], async_id=7
    006: kAllReduce [source | sink] kAllReduce
008: kAsyncDone     [source | sink] async_id=7
009: kWhile         [prev=008 (1) | next=012 (1)]
condition:
    010: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        011: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]
012: kWhile         [prev=009 (1) | next=016 (1)]
condition:
    013: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    014: kCustomKernel [source | sink] multiply grid: [1, 1, 1] threads: [1, 1, 1]
016: kConditional   [prev=012 (1) | sink]
  false_branch:
    017: kCopy [source | sink] kCopy
  true_branch:
    018: kWhile        [source | sink]
condition:
        019: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1] threads: [1, 1, 1]
      body:
        020: kCustomKernel [source | sink] square grid: [1, 1, 1] threads: [1, 1, 1]
"""
NAMES = {2: "dot.1", 9: "while.1", 12: "while.2", 18: "while.3"}
MODULE = """HloModule m, is_scheduled=true

%loop (p: s32[]) -> s32[] {
  ROOT %p = s32[] parameter(0)
}

ENTRY %main (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %dot.1 = s32[] copy(%x), metadata={op_name="jit(step)/layer_3/dot_general"}
  %while.1 = s32[] while(%dot.1), condition=%loop, body=%loop, backend_config={"known_trip_count":{"n":"5"}}
  %while.2 = s32[] while(%while.1), condition=%loop, body=%loop, metadata={op_name="jit(step)/mtp_1/while"}
  ROOT %while.3 = s32[] while(%while.2), condition=%loop, body=%loop, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_launches_by_layer():
    found = count_launches(read_thunks(THUNKS), NAMES, HloModule(MODULE))
    assert found["layer_3"] == LaunchCounts(kernels=1)  # in the graph
    assert found["mtp_1"] == LaunchCounts(kernels=2, kernels_outside_graphs=2, loops=1, host_syncs=1)
    # A kernel, two of a branch in the graph, an all-reduce; five turns of two; three turns of two in the longer branch.
    outside = 1 + 1 + 5 * 1 + 3 * 2
    others = LaunchCounts(
        kernels=outside + 2 + 5,
        kernels_outside_graphs=outside,
        graphs=1 + 5,
        loops=2,
        conditionals=2,
        host_syncs=1,  # the conditional that is in no graph
    )
    assert found[""] == others
    assert all_layers(found) == others + found["layer_3"] + found["mtp_1"]


def test_a_folder_of_a_dump(tmp_path):
    assert read_dump(tmp_path, HloModule(MODULE)) is None
    (tmp_path / "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt").write_text(THUNKS)
    (tmp_path / "module_0001.jit_f.thunk_metadata.txt").write_text(
        'thunk_metadata {\n  thunk_info {\n    profile_annotation: "dot.1"\n    thunk_id: 2\n  }\n}\n'
        'thunk_metadata {\n  thunk_info {\n    profile_annotation: "command_buffer_1"\n  }\n}\n'
    )
    found = read_dump(tmp_path, HloModule(MODULE))
    assert found is not None
    assert found["layer_3"].kernels == 1
    assert all_layers(found).host_syncs == 4  # without names no loop has a known length


# Bytes

E, F, D = 16, 64, 128  # experts of one device
EXPERTS = ExpertArrays(hidden_size=D, expert_size=F, bits=4, dtype="u8", touched=0.5)
PARAMETER = "metadata={op_name=\"params[\\'layers.3.moe.experts.gate\\'].q\"}"
HEAD = """HloModule m, is_scheduled=true

%gathering (w: u8[16,64,64], ids: s32[2]) -> f32[2] {
  %w = u8[16,64,64] parameter(0)
  %ids = s32[2] parameter(1)
  %wide = f32[16,64,64] convert(%w)
  %rows = f32[2,64,64] gather(%wide, %ids), offset_dims={1,2}
  %zero = f32[] constant(0)
  ROOT %sum = f32[2] reduce(%rows, %zero), dimensions={1,2}, to_apply=%add
}

%widening (w: u8[4,64,64]) -> bf16[4,64,128] {
  %w = u8[4,64,64] parameter(0)
  %both = u8[4,64,64,2] broadcast(%w), dimensions={0,1,2}
  %flat = u8[4,64,128] bitcast(%both)
  ROOT %wide = bf16[4,64,128] convert(%flat)
}

%putting (cache: bf16[1024,8], new: bf16[1,8], at: s32[]) -> bf16[1024,8] {
  %cache = bf16[1024,8] parameter(0)
  %new = bf16[1,8] parameter(1)
  %at = s32[] parameter(2)
  ROOT %put = bf16[1024,8] dynamic-update-slice(%cache, %new, %at, %at)
}

%turn (state: (s32[], u8[16,64,64])) -> (s32[], u8[16,64,64]) {
  %state = (s32[], u8[16,64,64]) parameter(0)
  %index = s32[] get-tuple-element(%state), index=0
  %all = u8[16,64,64] get-tuple-element(%state), index=1
  %tile = u8[4,64,64] dynamic-slice(%all, %index, %index, %index), dynamic_slice_sizes={4,64,64}
  %wide = bf16[4,64,128] fusion(%tile), kind=kLoop, calls=%widening
  %product = bf16[64,64] custom-call(%wide), custom_call_target="__cublas$gemm"
  ROOT %next = (s32[], u8[16,64,64]) tuple(%index, %all)
}

%more (state: (s32[], u8[16,64,64])) -> pred[] {
  %state = (s32[], u8[16,64,64]) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""


def read(entry: str):
    text = f"{HEAD}\nENTRY %main (w: u8[16,64,64], ids: s32[2], x: bf16[8,128]) -> f32[2] {{\n{entry}\n}}\n"
    return traffic(HloModule(text), EXPERTS)


W = f"  %w = u8[16,64,64] parameter(0), {PARAMETER}"
IDS = "  %ids = s32[2] parameter(1)"


def test_rows_that_a_fusion_gathers_are_read_alone():
    found = read(f"{W}\n{IDS}\n  ROOT %f = f32[2] fusion(%w, %ids), kind=kInput, calls=%gathering")
    assert found.read == {"layer_3": 2 * F * D // 2 + 2 * 4}
    assert found.widened_bytes == 0


def test_what_is_put_into_a_cache_is_read_and_not_the_cache():
    entry = (
        "  %cache = bf16[1024,8] parameter(0)\n  %new = bf16[1,8] parameter(1)\n  %at = s32[] parameter(2)\n"
        "  ROOT %f = bf16[1024,8] fusion(%cache, %new, %at), kind=kLoop, calls=%putting"
    )
    assert read(entry).read_bytes == 8 * 2 + 4


def test_a_loop_widens_a_tile_at_a_time():
    entry = (
        f"{W}\n{IDS}\n  %index = s32[] constant(0)\n  %state = (s32[], u8[16,64,64]) tuple(%index, %w)\n"
        "  %loop = (s32[], u8[16,64,64]) while(%state), condition=%more, body=%turn,"
        ' metadata={op_name="layer_7/while"}, backend_config={"known_trip_count":{"n":"4"}}\n'
        "  ROOT %i = s32[] get-tuple-element(%loop), index=0"
    )
    found = read(entry)
    tile, wide = 4 * F * D // 2, 4 * F * D * 2
    # A turn takes a slice, widens it, and multiplies by it; the product's touched half of the experts counts.
    assert found.read == {"layer_7": 4 * (tile + 3 * 4 + tile + wide // 2)}
    assert found.widened == {"layer_7": wide}


@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        ("bf16[4,64,128]", True),
        ("bf16[4,64,2,64]", True),
        pytest.param("bf16[256,128]", True, marks=pytest.mark.slow),  # joined
        pytest.param("bf16[250,128]", False, marks=pytest.mark.slow),
        ("bf16[4,64,64]", True),  # the lower halves of each byte
        pytest.param("u8[4,64,128]", False, marks=pytest.mark.slow),
        ("bf16[16,64,2]", False),  # scales
    ],
)
def test_an_array_of_experts_has_both_of_their_sizes(shape, wide):
    (array,) = HloModule(f"ENTRY %main () -> {shape} {{\n  ROOT %x = {shape} parameter(0)\n}}")["main"][0].arrays
    assert EXPERTS.widened(array) == wide


def test_a_kernel_reads_the_experts_that_its_tokens_use():
    found = read(f'{W}\n{IDS}\n  ROOT %f = f32[2] custom-call(%w, %ids), custom_call_target="triton_kernel_call"')
    assert found.read_bytes == E * F * D // 2 // 2 + 2 * 4
