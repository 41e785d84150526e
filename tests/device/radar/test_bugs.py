"""Known bugs: the table, who meets which, what is done about them, and the graph patterns."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ampdeploy.config import EngineConfig
from ampdeploy.device.radar.bugs import (
    DATA_FILE,
    WORKAROUNDS,
    Bug,
    apply_workarounds,
    bug_table,
    find_bugs,
    read_table,
)
from ampdeploy.device.radar.graph_patterns import PATTERNS, graph_patterns
from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.export.onnx import export_onnx
from tests.mlp_kinds import make

ALL = set(PATTERNS)
TABLE = bug_table()


def ids(**options) -> list[str]:
    defaults = {"target": "trt", "compute_capability": "8.7", "patterns": ALL}
    return [bug.id for bug in find_bugs(**{**defaults, **options})]


# The table.


def test_every_pattern_and_workaround_is_used_and_every_bug_has_its_proof():
    used = {name for bug in TABLE.bugs for name in bug.patterns}
    assert used == ALL
    assert {bug.applies for bug in TABLE.bugs} == set(WORKAROUNDS)
    for bug in TABLE.bugs:
        number = bug.link.rstrip("/").split("/")[-1]
        assert number in bug.verified, bug.id  # the note speaks about the thread it links


def test_no_build_meets_two_changes_that_undo_each_other():
    changing = [bug for bug in TABLE.bugs if bug.applies in ("static-batch", "min-max-batch-2")]
    ends = {end for bug in changing for end in (bug.tensorrt_from, bug.tensorrt_below) if end}
    for version, capability in itertools.product(ends, ("8.7", "11.0")):
        found = ids(tensorrt_version=version, compute_capability=capability)
        assert len({bug.applies for bug in changing if bug.id in found}) <= 1


def good_entry(**changes) -> dict:
    entry = {
        "id": "a", "targets": ["trt"], "tensorrt_from": "10.3", "tensorrt_below": "10.5",
        "compute_capabilities": ["8.7"], "patterns": ["rope"], "symptom": "s", "workaround": "w",
        "applies": "advise", "link": "https://a/1", "more_links": [], "verified": "1: v",
    }  # fmt: skip
    return {**entry, **changes}


def table_text(*entries, schema_version=1) -> str:
    return json.dumps({"schema_version": schema_version, "data_version": 3, "bugs": list(entries)})


def test_a_good_table_is_read():
    table = read_table(table_text(good_entry(), good_entry(id="b", tensorrt_below=None)))
    assert table.data_version == 3
    assert [bug.versions for bug in table.bugs] == ["10.3 to before 10.5", "10.3 and newer"]
    assert [bug.gpus for bug in table.bugs] == ["SM 8.7", "SM 8.7"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (table_text(schema_version=2), "schema version 2"),
        (table_text(good_entry(targets=["tensorrt"])), "unknown target 'tensorrt'"),
        (table_text(good_entry(patterns=["ropes"])), "unknown pattern 'ropes'"),
        (table_text(good_entry(patterns=[])), "a target and a pattern"),
        (table_text(good_entry(applies="pray")), "unknown workaround 'pray'"),
        (table_text(good_entry(tensorrt_from="ten")), "no versions"),
        (table_text(good_entry(tensorrt_from="10.5")), "range 10.5 to before 10.5 is empty"),
        (table_text(good_entry(compute_capabilities=["sm_87"])), "'sm_87'"),
        (table_text(good_entry(symptom=" ")), "a text is empty"),
        (table_text(good_entry(link="4419")), "'4419' is no link"),
        (table_text(good_entry(), good_entry()), "a: the id is used twice"),
        (table_text(good_entry(verified=None)), "verified"),
        (table_text(good_entry(severity="bad")), "'severity'"),
        (table_text("entry"), "damaged"),
        ("[]", "schema version None"),
    ],
)
def test_a_bad_table_is_our_bug(text, named):
    with pytest.raises(ValueError, match=DATA_FILE) as caught:
        read_table(text)
    assert named in str(caught.value)


# Who meets which.


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("10.3.0.30", "8.7", {"dynamic-batch-transformer", "rope-vit-wrong", "conditional-shapes"}),
        ("10.4.0", "8.6", {"dynamic-batch-transformer", "rope-vit-wrong", "conditional-shapes"}),
        ("10.5.0", "8.6", {"rope-vit-wrong", "conditional-shapes"}),
        ("10.6.0.26", "8.6", {"conditional-shapes"}),
        ("10.7.0.23", "8.9", {"sqrt-scale-both-sides", "conditional-shapes"}),
        ("10.8.0.43", "8.9", {"conditional-shapes"}),
        ("10.8.0.43", "12.0", {"conditional-shapes", "fused-attention-sm120"}),
        (
            "10.13.3.9",
            "11.0",
            {
                "horizontal-gemm-fusion-thor",
                "horizontal-gemm-fusion",
                "batched-conv-between-blocks",
            },
        ),
        ("10.13.3.9", "8.9", {"horizontal-gemm-fusion", "batched-conv-between-blocks"}),
        (
            "10.16.1.11",
            "12.0",
            {"fused-attention-sm120", "horizontal-gemm-fusion", "batched-conv-between-blocks"},
        ),
        ("11.4.1", "12.0", {"horizontal-gemm-fusion", "batched-conv-between-blocks"}),
        ("9.3.0", "8.6", {"conditional-shapes"}),
    ],
)  # fmt: skip
def test_versions_and_gpus_decide(version, capability, expected):
    found = find_bugs(
        tensorrt_version=version, target="trt", compute_capability=capability, patterns=ALL
    )
    assert all(bug.certain for bug in found)
    # Arithmetic of FP16 holds for all of them.
    assert {bug.id for bug in found} == expected | {"fp16-variance"}


def test_a_number_is_compared_as_a_number():
    assert "conditional-shapes" in ids(tensorrt_version="10.9")  # "10.9" > "10.11" as text
    assert "conditional-shapes" not in ids(tensorrt_version="10.11")


def test_rtx_has_versions_of_its_own():
    assert ids(target="trt-rtx", tensorrt_version="1.7.1.116") == ["fp16-variance"]


def test_what_is_not_known_is_not_certain():
    planned = {
        bug.id: bug.certain
        for bug in find_bugs(
            tensorrt_version=None, target="trt", compute_capability=None, patterns=ALL
        )
    }
    assert set(planned) == {bug.id for bug in TABLE.bugs}
    assert [name for name, certain in planned.items() if certain] == ["fp16-variance"]
    no_gpu_yet = {
        bug.id: bug.certain
        for bug in find_bugs(
            tensorrt_version="10.13.3.9", target="trt", compute_capability=None, patterns=ALL
        )
    }
    assert no_gpu_yet["horizontal-gemm-fusion-thor"] is False
    assert no_gpu_yet["horizontal-gemm-fusion"] is True
    assert "rope-vit-wrong" not in no_gpu_yet
    unreadable = find_bugs(
        tensorrt_version="unknown", target="trt", compute_capability="8.7", patterns={"rope"}
    )
    assert not any(bug.certain for bug in unreadable)


def test_the_graph_decides():
    assert ids(tensorrt_version="10.3", patterns=set()) == []
    assert ids(tensorrt_version="10.3", patterns={"transformer", "dynamic-batch"}) == [
        "dynamic-batch-transformer"
    ]
    assert ids(tensorrt_version="10.3", patterns={"transformer"}) == []


# What is done about them.


def bug(applies: str, **changes) -> Bug:
    (entry,) = read_table(table_text(good_entry(applies=applies))).bugs
    return dataclasses.replace(entry, **changes)


@pytest.mark.parametrize(
    ("applies", "batch", "becomes"),
    [
        ("static-batch", (1, 4, 8), (4, 4, 4)),
        ("static-batch", (8, 8, 8), (8, 8, 8)),
        ("min-max-batch-2", (1, 1, 1), (1, 1, 2)),
        ("min-max-batch-2", (1, 1, 8), (1, 1, 8)),
    ],
)
def test_the_batch_is_changed_and_that_is_said(applies, batch, becomes):
    asked = EngineConfig(batch=batch, portable="version", strip_weights=True)
    config, notes = apply_workarounds(asked, [bug(applies)])
    assert config == dataclasses.replace(asked, batch=becomes)
    assert len(notes) == (batch != becomes)
    for note in notes:
        assert ",".join(map(str, batch)) in note
        assert ",".join(map(str, becomes)) in note
        assert "https://a/1" in note


def test_advice_changes_nothing():
    asked = EngineConfig(batch=(1, 1, 1))
    for applies in ("advise", "advise-at-batch-1"):
        config, notes = apply_workarounds(asked, [bug(applies, workaround="do this")])
        assert config == asked
        assert len(notes) == 1
        assert "do this" in notes[0]
        assert "https://a/1" in notes[0]
    assert apply_workarounds(EngineConfig(), [bug("advise-at-batch-1")]) == (EngineConfig(), [])


def test_every_refusal_is_named_with_its_link():
    bugs = [
        bug("advise", id="one"),
        bug("refuse", id="two", link="https://a/2"),
        bug("refuse-batched", id="three", link="https://a/3"),
    ]
    with pytest.raises(VerificationError) as caught:
        apply_workarounds(EngineConfig(), bugs)
    for part in ("bug two", "https://a/2", "bug three", "https://a/3", "10.3 to before 10.5"):
        assert part in str(caught.value)
    assert "bug one" not in str(caught.value)
    only_one = EngineConfig(batch=(1, 1, 1))
    assert apply_workarounds(only_one, [bug("refuse-batched")]) == (only_one, [])


def test_nothing_is_changed_or_refused_on_a_guess():
    for applies in WORKAROUNDS:
        asked = EngineConfig(batch=(1, 1, 1) if applies == "min-max-batch-2" else (1, 2, 4))
        config, notes = apply_workarounds(asked, [bug(applies, certain=False)])
        assert config == asked
        assert len(notes) == 1
        assert "may be met" in notes[0]


def test_thor_at_batch_1_gets_one_change_and_no_second_word():
    found = find_bugs(
        tensorrt_version="10.13.3.9",
        target="trt",
        compute_capability="11.0",
        patterns={"transformer", "shared-input-gemms"},
    )
    config, notes = apply_workarounds(EngineConfig(batch=(1, 1, 1)), found)
    assert config.batch == (1, 1, 2)
    assert len(notes) == 1
    assert "horizontal-gemm-fusion-thor" in notes[0]


def test_orin_on_jetpack_6_builds_dinov2_for_one_batch_and_refuses_dinov3():
    plain = {"transformer", "dynamic-batch"}
    options = {"tensorrt_version": "10.3.0.30", "target": "trt", "compute_capability": "8.7"}
    config, notes = apply_workarounds(EngineConfig(), find_bugs(**options, patterns=plain))
    assert config.batch == (1, 1, 1)
    assert len(notes) == 1
    with pytest.raises(VerificationError, match="issues/4742"):
        apply_workarounds(EngineConfig(), find_bugs(**options, patterns=plain | {"rope"}))


# The patterns: on real exports, and each on a graph that has it and one that nearly does.


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", set()),
        ("packed_swiglu", set()),
        ("swiglu_no_bias", {"shared-input-gemms"}),
        ("eva_split_gate", {"rope", "shared-input-gemms"}),
        ("eva_mixed_rope", {"rope"}),
    ],
)
def test_patterns_of_what_we_export(kind, expected, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(make(kind), path, opset=18)
    assert graph_patterns(path) == expected | {"transformer", "dynamic-batch"}


def test_the_scale_as_torch_exports_it(tmp_path):
    """What TensorRT 10.7 gets wrong (NVIDIA/TensorRT#4333), from torch's own exporter."""

    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    path = tmp_path / "sdpa.onnx"
    program = torch.onnx.export(
        Attention().eval(), (torch.zeros(1, 2, 4, 8),), dynamo=True, opset_version=18, verbose=False
    )
    program.save(str(path))
    assert graph_patterns(path) == {"transformer", "sqrt-scale-both-sides"}


F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16


def patterns_of(tmp_path, nodes, constants=None, *, kind=F32, batch="batch") -> set[str]:
    """Patterns of a graph x -> y of these nodes: (operator, inputs, output, attributes)."""
    made = [
        helper.make_node(operator, inputs.split(), output.split(), **dict(*attributes))
        for operator, inputs, output, *attributes in nodes
    ]
    tensors = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in (constants or {}).items()
    ]
    x = helper.make_tensor_value_info("x", kind, [batch, 4, 8])
    y = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(made, "test", [x], [y], tensors)
    path = tmp_path / "test.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), str(path))
    return graph_patterns(path)


SCALE = np.float32(0.5)


def attention(q="x", k="x", *, softmax_input="scores"):
    return [
        ("Transpose", k, "kt", {"perm": [0, 2, 1]}),
        ("MatMul", f"{q} kt", "scores"),
        ("Softmax", softmax_input, "weights"),
        ("MatMul", "weights x", "y"),
    ]


def test_attention_is_found_behind_scale_and_mask(tmp_path):
    nodes = attention(softmax_input="masked")
    nodes[2:2] = [("Mul", "scores s", "scaled"), ("Add", "mask scaled", "masked")]
    constants = {"s": SCALE, "mask": np.zeros((4, 4), np.float32)}
    assert patterns_of(tmp_path, nodes, constants) == {"transformer", "dynamic-batch"}
    # A classifier's softmax is no attention.
    nodes = [("MatMul", "x w", "logits"), ("Softmax", "logits", "y")]
    assert patterns_of(tmp_path, nodes, {"w": np.eye(8, dtype=np.float32)}, batch=1) == set()


def test_a_fixed_batch_is_not_dynamic(tmp_path):
    assert patterns_of(tmp_path, attention(), batch=8) == {"transformer"}


@pytest.mark.parametrize("scale", ["constant", "node", "computed", "one side", "per channel"])
def test_the_scale_on_both_sides(tmp_path, scale):
    constants = {"s": SCALE}
    nodes = [("Mul", "x root", "q"), ("Mul", "x root", "k"), *attention("q", "k")]
    if scale == "node":
        value = numpy_helper.from_array(np.sqrt(SCALE).reshape(1))
        nodes.insert(0, ("Constant", "", "root", {"value": value}))
    elif scale == "computed":
        nodes.insert(0, ("Sqrt", "s", "root"))
    elif scale == "per channel":  # the weight of a norm of q and k
        constants["root"] = np.ones(8, np.float32)
    else:
        constants["root"] = np.sqrt(SCALE)
    if scale == "one side":
        nodes[1] = ("Identity", "x", "k")
    found = "sqrt-scale-both-sides" in patterns_of(tmp_path, nodes, constants)
    assert found is (scale in ("constant", "node", "computed"))


@pytest.mark.parametrize("form", ["negated half", "difference", "no sine", "no attention"])
def test_rotary_embedding(tmp_path, form):
    constants = {"sin": np.ones((4, 4), np.float32), "cos": np.ones((4, 4), np.float32)}
    constants |= {"sin8": np.ones((4, 8), np.float32), "sizes": np.array([4, 4])}
    nodes = [("Split", "x sizes", "a b", {"axis": 2})]
    if form == "difference":
        nodes += [
            ("Mul", "a cos", "ac"), ("Mul", "b sin", "bs"), ("Sub", "ac bs", "left"),
            ("Mul", "a sin", "as"), ("Mul", "b cos", "bc"), ("Add", "as bc", "right"),
            ("Concat", "left right", "q", {"axis": 2}),
        ]  # fmt: skip
    else:
        used = "Identity" if form == "no sine" else "Mul"
        nodes += [("Neg", "b", "nb"), ("Concat", "nb a", "turned", {"axis": 2})]
        nodes += [(used, "turned" if form == "no sine" else "turned sin8", "q")]
    nodes += [("Identity", "q", "y")] if form == "no attention" else attention("q")
    found = "rope" in patterns_of(tmp_path, nodes, constants)
    assert found is (form in ("negated half", "difference"))


def test_fp16_attention_is_told_by_its_types(tmp_path):
    assert "fp16-attention" in patterns_of(tmp_path, attention(), kind=F16)
    assert "fp16-attention" not in patterns_of(tmp_path, attention())
    to_float = [("Cast", "x", "q", {"to": F32}), ("Cast", "x", "k", {"to": F32})]
    back = [("Cast", "weights", "half", {"to": F16}), ("MatMul", "half x", "y")]
    nodes = [*to_float, *attention("q", "k")[:3], *back]
    assert "fp16-attention" not in patterns_of(tmp_path, nodes, kind=F16)


def test_casts_at_the_end_of_the_file_are_followed(tmp_path):
    """As onnxruntime's float16 converter leaves them."""
    nodes = [*attention("q", "k")[:3], ("MatMul", "weights k", "half"), ("Cast", "half", "y")]
    nodes[-1] = (*nodes[-1], {"to": F32})
    nodes += [("Cast", "x", "q", {"to": F16}), ("Cast", "x", "k", {"to": F16})]
    assert {"transformer", "fp16-attention"} <= patterns_of(tmp_path, nodes)
    weight = {"w": np.ones((4, 4, 1), np.float16)}
    nodes[3:5] = [("MatMul", "weights k", "mixed"), ("Conv", "mixed w", "y")]
    nodes.insert(0, nodes.pop(4))
    assert "conv-between-blocks" in patterns_of(tmp_path, nodes, weight)


def test_gemms_that_share_their_input_are_found_behind_casts(tmp_path):
    weight = np.eye(8, dtype=np.float16)
    nodes = [
        ("Cast", "x", "x1", {"to": F16}), ("MatMul", "x1 w1", "gate"),
        ("Cast", "x", "x2", {"to": F16}), ("MatMul", "x2 w2", "up"),
        ("Mul", "gate up", "y"),
    ]  # fmt: skip
    constants = {"w1": weight, "w2": weight}
    assert "shared-input-gemms" in patterns_of(tmp_path, nodes, constants)
    nodes[2:4] = [("Cast", "gate", "x2", {"to": F16}), ("MatMul", "x2 w2", "up")]
    assert "shared-input-gemms" not in patterns_of(tmp_path, nodes, constants)


def test_a_convolution_after_attention(tmp_path):
    constants = {"w": np.ones((4, 4, 1), np.float32)}
    after = [*attention()[:3], ("MatMul", "weights x", "mixed"), ("Conv", "mixed w", "y")]
    assert "conv-between-blocks" in patterns_of(tmp_path, after, constants)
    before = [("Conv", "x w", "patches"), *attention("patches", "patches")]
    assert "conv-between-blocks" not in patterns_of(tmp_path, before, constants)


@pytest.mark.parametrize("square", [("Pow", "x two"), ("Mul", "x x")])
def test_a_variance_in_fp16(tmp_path, square):
    nodes = [(*square, "square"), ("ReduceMean", "square", "y")]
    two = {"two": np.float32(2)}
    assert "fp16-variance" in patterns_of(tmp_path, nodes, two, kind=F16)
    assert "fp16-variance" not in patterns_of(tmp_path, nodes, two)
    pooled = [("ReduceMean", "x", "y")]
    assert "fp16-variance" not in patterns_of(tmp_path, pooled, kind=F16)


def test_operators_that_are_patterns(tmp_path):
    assert {"attention-op", "transformer"} <= patterns_of(tmp_path, [("Attention", "x x x", "y")])
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", F32, None)],
    )
    choice = ("If", "yes", "y", {"then_branch": branch, "else_branch": branch})
    assert "control-flow" in patterns_of(tmp_path, [choice], {"yes": np.array(True)})


@pytest.mark.parametrize("content", [None, b"", b"no protobuf at all"])
def test_a_file_that_is_no_onnx(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        graph_patterns(path)
